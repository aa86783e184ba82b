"""GPT-2 by itself."""

import jax
import jax.numpy as jnp
import pytest

import qlora_jax as qj
from qlora_jax import QloraError
from qlora_jax.models import read_config
from tests.models import decoders

PLAIN = {
    "model_type": "gpt2",
    "vocab_size": 50,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 24,
    "n_inner": 48,
    "scale_attn_by_inverse_layer_idx": True,
}


def test_config():
    decoders.check_config(PLAIN | {"activation_function": "relu", "pad_token_id": 3})
    config = read_config({k: v for k, v in PLAIN.items() if k != "n_inner"})
    assert (config.intermediate_size, config.eos_token_id) == (128, (50256,))


def test_cache_and_packing():
    decoders.check_cache_and_packing(read_config(PLAIN))


def test_lora_step():
    decoders.check_lora_step(read_config(PLAIN))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_cross_attention": True}, "add_cross_attention True is not supported"),
        ({"activation_function": "mish"}, "activation_function 'mish' is not supported; known: "),
        ({"n_head": 5}, "n_embd 32 is not a multiple of n_head 5"),
        ({"n_layer": None}, r"lacks \['n_layer'\]"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(QloraError, match=message):
        read_config(PLAIN | changes)


def test_bytes_of_gpt2_xl():
    size = decoders.bytes_in_4bit(
        {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 1600, "n_layer": 48, "n_head": 25}
    )
    kernels = ((1600, 4800), (1600, 1600), (1600, 6400), (6400, 1600))
    # Codes; a byte for every 64; 4 bytes for every 256 of those, rounded up, and 4 more.
    four_bit = sum(k * n // 2 + k * n // 64 + 4 * -(-k * n // 64 // 256) + 4 for k, n in kernels)
    biases = 2 * (4800 + 1600 + 6400 + 1600)
    norm = (4 + 4) * 1600
    tables = 2 * 1600 * (50257 + 1024)
    assert size == 48 * (four_bit + biases + 2 * norm) + norm + tables


def test_an_adapter_of_the_tied_embedding_is_not_written_for_peft(tmp_path):
    """PEFT would adapt the embedding, and leave out the head, which has the same weight."""
    config = read_config(PLAIN)
    model = qj.Model(config, decoders.random_params(config), None, "", jnp.float32)
    adapters = qj.lora.init(
        jax.random.key(0), model.params, qj.LoraConfig(rank=2, targets=("embed_tokens",))
    )
    with pytest.raises(QloraError, match="transformer.wte is also of the head tied to it"):
        qj.peft.save(tmp_path / "a", adapters, model)
    assert not (tmp_path / "a").exists()
