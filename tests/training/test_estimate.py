"""The formula's parts against counts by hand; its whole against a compiler in tests/compile."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, SingleDeviceSharding

from qlora_jax.errors import QloraError
from qlora_jax.lora import LoraConfig
from qlora_jax.models import read_config
from qlora_jax.models.loss import CHUNK
from qlora_jax.parallel import Layout
from qlora_jax.plan import abstract
from qlora_jax.plan.devices import find
from qlora_jax.quant import NF4
from qlora_jax.training.estimate import attention_of
from qlora_jax.training.settings import TrainSettings
from tests.recipes import CONFIGS

pytestmark = pytest.mark.standard_promotion  # optax

L, D, F, V, H, R, B, T = 3, 64, 128, 32, 4, 4, 2, 32
ABOUT = {
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "max_position_embeddings": 65536,
}
LINEAR = 4 * D * D + 3 * D * F
TRAINED = R * L * (4 * 2 * D + 3 * (D + F))


FORMAT = NF4()


def footprint(quantization=FORMAT, decoded=3, fsdp=1, time=T, kernels=(), **training):
    config = read_config(ABOUT)
    step = abstract.train_step(
        config,
        time,
        LoraConfig(rank=R),
        TrainSettings(batch_size=B, **training),
        quantization,
        jnp.bfloat16,
    )
    where = SingleDeviceSharding(jax.devices()[0])
    if fsdp > 1:
        where = Layout.of(AbstractMesh((1, fsdp, 1), ("data", "fsdp", "tensor")), config)
    return step.estimate(where, decoded=decoded, kernels=kernels)


def test_arguments_are_counted():
    found = footprint(remat="full")
    assert found.codes == L * LINEAR // 2
    blocks = L * LINEAR // 64
    nested = L * (4 * -(-D * D // 64 // 256) + 3 * -(-D * F // 64 // 256))
    assert found.scales == blocks + 4 * nested + 4 * 7 * L  # and an offset for each weight
    assert found.embeddings == 2 * 2 * V * D
    assert found.dense == 4 * (2 * L * D + D)
    assert found.adapters == found.gradients == 4 * TRAINED
    assert found.optimizer == 2 * 4 * TRAINED + 2 * 4  # two moments, and two counts of steps
    assert footprint(quantization=None, remat="full").dense - found.dense == 2 * L * LINEAR


def test_activations_are_what_the_policies_keep():
    """Beside each layer's: the last output, a chunk of rows for the loss, and masks."""
    token, few = 2 * B * T, 2 * D * (4 * B * T + CHUNK)
    full = footprint(remat="full").activations
    assert L * token * D <= full <= L * token * D + few
    names = footprint(remat="names").activations
    assert L * token * 5 * D <= names <= L * token * 5 * D + few
    dots = footprint(remat="dots").activations
    assert dots - names == L * token * 2 * F
    none = footprint(remat="none").activations
    assert none > dots
    offload = footprint(remat="offload")
    assert offload.activations_host == L * token * 5 * D
    assert offload.activations <= few


def test_spans_of_attention_keep_q_k_and_v_once():
    """Of 512 tokens there are four, and each says that it keeps them."""
    time = 512
    token, few = 2 * B * time, 2 * D * (4 * B * time + CHUNK)
    names = footprint(remat="names", time=time).activations
    assert L * token * 5 * D <= names <= L * token * 5 * D + few
    assert footprint(remat="dots", time=time).activations - names == L * token * 2 * F


@pytest.mark.slow
def test_scores_are_counted_where_xla_computes_them():
    def scores(time, *kernels, **training):
        xla = footprint(remat="full", time=time)
        return xla.working - footprint(remat="full", time=time, kernels=kernels, **training).working

    heads = ABOUT["num_attention_heads"]
    assert scores(2048, "cudnn") == 4 * B * heads * 2048 * 2048
    assert scores(4096, "splash") == 4 * B * heads * 4096 * 2048
    assert scores(2048) == scores(2048, "cudnn", attention="xla") == 0
    assert scores(64, "splash") == 0  # it is for 128 tokens and more
    assert scores(32768, "cudnn", packing=True) == 0  # its mask would take 8 GiB


def test_a_named_attention_must_run_there():
    with pytest.raises(QloraError, match="'splash' does not run on this device, xla or cudnn does"):
        footprint(kernels=("cudnn",), attention="splash")


def attention(about, kernels, batch=1, time=512, dtype=jnp.bfloat16, packed=True):
    model = SimpleNamespace(config=read_config(about), dtype=dtype)
    tokens = jax.ShapeDtypeStruct((batch, time), jnp.int32)
    names = ("input_ids", "attention_mask", *["segment_ids"] * packed)
    return attention_of(model, dict.fromkeys(names, tokens), kernels)


def test_the_attention_is_what_the_device_would_choose():
    assert attention(ABOUT, find("a6000").attention) == "cudnn"
    assert attention(ABOUT, find("a6000").attention, dtype=jnp.float32) == "xla"
    # Packed, a mask of 3 x 16384^2 numbers; padding needs none, but where experts are balanced.
    long = {"batch": 3, "time": 16384}
    assert attention(ABOUT, find("a6000").attention, **long) == "xla"
    assert attention(ABOUT, find("a6000").attention, **long, packed=False) == "cudnn"
    experts = ABOUT | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    experts |= {"num_key_value_heads": H}
    balanced = experts | {"output_router_logits": True}
    assert attention(experts, find("a6000").attention, **long, packed=False) == "cudnn"
    assert attention(balanced, find("a6000").attention, **long, packed=False) == "xla"
    assert attention(ABOUT, find("t4").attention) == "xla"
    assert attention(ABOUT, find("v5e-8").attention) == "splash"
    capped = ABOUT | {"model_type": "gemma2", "num_key_value_heads": H, "head_dim": 16}
    assert attention(capped, find("h100").attention) == "xla"
    assert attention(capped, find("v6e:2x2").attention) == "splash"
    for encoder in ("roberta-large-sst2", "flan-t5-xxl"):
        about = CONFIGS[encoder] | {"vocab_size": V}
        assert attention(about, find("a6000").attention) == "xla"


def test_accumulating_takes_a_second_gradient():
    once, often = footprint(remat="full"), footprint(remat="full", accumulate=4)
    assert often.gradients == 2 * once.gradients
    assert often.activations == once.activations


def test_kernels_decode_on_the_way():
    assert footprint(decoded=3).working - footprint(decoded=0).working == 3 * 2 * D * F


def test_fsdp_shares_rows_and_weights():
    whole, half = footprint(remat="none"), footprint(remat="none", fsdp=2)
    assert half.activations * 2 == pytest.approx(whole.activations, abs=2)
    assert half.codes * 2 == whole.codes
    assert half.optimizer < 0.51 * whole.optimizer


def test_a_paged_optimizer_is_in_the_hosts_memory():
    plain, paged = footprint(remat="full"), footprint(remat="full", paged=True)
    assert (paged.optimizer, paged.optimizer_host) == (0, plain.optimizer)
    assert paged.total == plain.total - plain.optimizer


def test_a_compilers_temporaries_are_told_apart():
    found = footprint(remat="full")
    measured = found.measured(found.gradients + found.activations + 10)
    assert (measured.working, measured.activations) == (10, found.activations)
    less = found.measured(found.gradients + 5)
    assert (less.working, less.activations, less.gradients) == (0, 5, found.gradients)
    assert less.total == found.arguments + found.gradients + 5


def test_nothing_is_allocated():
    before = len(jax.live_arrays())
    footprint(remat="names")
    assert len(jax.live_arrays()) <= before + 8  # constants that tracing caches
