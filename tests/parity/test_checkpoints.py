"""Checkpoints that the real libraries write and read: what they mean here and there is the same."""

import copy
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import qlora_jax as qj
from benchmarks import smollm2
from qlora_jax.checkpoints.bitsandbytes_export import save_bitsandbytes
from qlora_jax.checkpoints.export import save_pretrained
from qlora_jax.checkpoints.gguf_export import save_gguf
from qlora_jax.generation import Sampling, generate
from qlora_jax.lora.adapters import named_leaves
from tests.parity.decoders import SMALL, batch, logits, peer_logits, random_peer
from tests.parity.test_transformers import peer_config

pytestmark = pytest.mark.standard_promotion
EAGER: dict[str, Any] = {"attn_implementation": "eager"}


def four_bits(folder: Path, out: Path, dtype: torch.dtype, **settings: Any) -> Any:
    """The checkpoint quantized, and written to `out`, by transformers."""
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=dtype, **EAGER
    )
    model.save_pretrained(out)
    return model


def assert_same_tensors(a: Path, b: Path) -> None:
    first, second = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert first.keys() == second.keys()
    for name, x in first.items():
        y = second[name]
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        assert x.flatten().view(torch.uint8).equal(y.flatten().view(torch.uint8)), name


def numbers(model: Any, dtype: torch.dtype | None = None) -> dict[str, np.ndarray]:
    """The weights of a model of transformers, 4-bit ones by bitsandbytes' own dequantization.

    dtype: what these are rounded to, by default the type of what they were made from.
    """
    import bitsandbytes.functional as functional

    found = {}
    for name, x in model.named_parameters():
        if (state := getattr(x, "quant_state", None)) is not None:
            state = copy.copy(state)
            state.dtype = dtype or state.dtype
            x = functional.dequantize_4bit(x.data, state)
        found[name] = x.detach().float().numpy()
    return found


FORMATS = {
    "nf4, nested": ({"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, "float32"),
    "fp4, in bf16": ({"bnb_4bit_quant_storage": torch.bfloat16}, "bfloat16"),
    "nf4, in fp32, bf16": (
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.float32},
        "bfloat16",
    ),
    "fp4, nested, in fp16, a module skipped": (
        {
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_quant_storage": torch.float16,
            "llm_int8_skip_modules": ["lm_head", "down_proj"],
        },
        "float16",
    ),
}


@pytest.mark.parametrize("form", FORMATS)
def test_bitsandbytes_there_and_back(form, tmp_path):
    """Its file is read, and written again to the last byte; transformers loads what we wrote."""
    settings, dtype = FORMATS[form]
    config = transformers.Qwen2Config(**(SMALL | {"intermediate_size": 128}))
    random_peer(config).save_pretrained(tmp_path / "base")
    kind = getattr(torch, dtype)
    theirs = four_bits(tmp_path / "base", tmp_path / "theirs", kind, **settings)
    model = qj.load(tmp_path / "theirs")
    storage: Any = str(settings.get("bnb_4bit_quant_storage", "uint8")).removeprefix("torch.")
    save_bitsandbytes(tmp_path / "ours", model, storage=storage)
    assert_same_tensors(tmp_path / "theirs", tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", **EAGER)
    before, after = numbers(theirs), numbers(again)
    assert before.keys() == after.keys()
    for name, x in before.items():
        np.testing.assert_array_equal(after[name], x, err_msg=name)
    skipped = "llm_int8_skip_modules" in settings
    down = model.params["layers"]["mlp"]["down_proj"]["kernel"]
    assert isinstance(down, qj.QuantizedArray) != skipped
    # In fp32 we multiply by what the codes stand for, before it is rounded to 16 bits.
    exact = numbers(theirs, torch.float32)
    dense = random_peer(config)
    dense.load_state_dict({name: torch.from_numpy(x) for name, x in exact.items()})
    given = batch("left")
    ours, expected = logits(model, model.params, given), peer_logits(dense, given)
    np.testing.assert_allclose(ours[given.real], expected[given.real], rtol=0, atol=1e-4)


def test_bitsandbytes_loads_what_was_quantized_here(tmp_path):
    """Also what has no 4-bit form there: the 160 inputs of down_proj, in blocks of 64."""
    random_peer(peer_config("llama 1 and 2")).save_pretrained(tmp_path / "base")
    model = qj.load(tmp_path / "base", quantization=qj.NF4())
    save_bitsandbytes(tmp_path / "ours", model)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", **EAGER)
    found = numbers(peer)
    layers = model.params["layers"]
    for group, name in (("self_attn", "v_proj"), ("mlp", "gate_proj"), ("mlp", "down_proj")):
        weight = layers[group][name]["kernel"].dequantize()[2]
        full = f"model.layers.2.{group}.{name}.weight"
        np.testing.assert_array_equal(found[full], np.asarray(weight).T, err_msg=full)
    module = peer.model.layers[2].mlp
    kinds = type(module.gate_proj).__name__, type(module.down_proj).__name__
    assert kinds == ("Linear4bit", "Linear")


def test_bitsandbytes_beside_dense_experts(tmp_path):
    """transformers 5 keeps experts dense, which are then a leaf like any other."""
    sizes = {"intermediate_size": 64, "num_hidden_layers": 2, "num_local_experts": 2}
    random_peer(transformers.MixtralConfig(**(SMALL | sizes))).save_pretrained(tmp_path / "base")
    four_bits(tmp_path / "base", tmp_path / "theirs", torch.float32)
    model = qj.load(tmp_path / "theirs")
    experts = model.params["layers"]["mlp"]["experts"]["up_proj"]["kernel"]
    assert not isinstance(experts, qj.QuantizedArray)
    save_bitsandbytes(tmp_path / "again", model)
    assert_same_tensors(tmp_path / "theirs", tmp_path / "again")


@pytest.mark.parametrize("shards", [False, True])
def test_what_torch_wrote(shards, tmp_path):
    """pytorch_model.bin and its shards, as transformers wrote them until version 4."""
    peer = random_peer(peer_config("llama, biases")).to(torch.bfloat16)
    peer.save_pretrained(tmp_path / "safe")
    bins = tmp_path / "bins"
    bins.mkdir()
    (bins / "config.json").write_bytes((tmp_path / "safe" / "config.json").read_bytes())
    state = {name: x.detach().clone() for name, x in peer.state_dict().items()}
    if shards:
        names = sorted(state)
        weight_map = {name: f"pytorch_model-0000{i % 2}.bin" for i, name in enumerate(names)}
        for file in set(weight_map.values()):
            part = {name: state[name] for name in names if weight_map[name] == file}
            # The format before PyTorch 1.6, which is no archive.
            torch.save(part, bins / file, _use_new_zipfile_serialization=file.endswith("0.bin"))
        index = {"metadata": {}, "weight_map": weight_map}
        (bins / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(state, bins / "pytorch_model.bin")
    ours, theirs = (named_leaves(qj.load(bins.parent / f).params) for f in ("bins", "safe"))
    for path, x in theirs.items():
        assert x.dtype == ours[path].dtype
        np.testing.assert_array_equal(x, ours[path], err_msg=path)


def test_what_torch_wrote_may_not_run_anything(tmp_path):
    class Harmful:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "harm",))

    peer_config("qwen3").save_pretrained(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": Harmful()}, file)
    with pytest.raises(qj.QloraError, match=r"pytorch_model\.bin: cannot be read as tensors"):
        qj.load(tmp_path)
    assert not (tmp_path / "harm").exists()
    torch.save({"state_dict": {"a": torch.ones(2)}}, file)
    with pytest.raises(qj.QloraError, match="no dense tensors: state_dict"):
        qj.load(tmp_path)
    torch.save([torch.ones(2)], file)
    with pytest.raises(qj.QloraError, match="expected named tensors, found a list"):
        qj.load(tmp_path)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(qj.QloraError, match="cannot be read as tensors"):
        qj.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")  # wins over .bin, whatever it holds
    with pytest.raises(qj.QloraError, match="cannot be read as safetensors"):
        qj.load(tmp_path)


def test_an_adapter_that_torch_wrote(tmp_path):
    """adapter_model.bin, as PEFT wrote it before safetensors and does when asked."""
    peer = random_peer(peer_config("llama 1 and 2"))
    peer.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(peer, lora)
    for safe in (True, False):
        adapted.save_pretrained(tmp_path / str(safe), safe_serialization=safe)
    assert not (tmp_path / "False" / "adapter_model.safetensors").exists()
    model = qj.load(tmp_path / "base")
    first, second = (qj.peft.load(tmp_path / name, model) for name in ("True", "False"))
    assert first[1] == second[1]
    (a,), (b,) = first[0].values(), second[0].values()
    np.testing.assert_array_equal(a.b, b.b)
    np.testing.assert_array_equal(a.a, b.a)


@pytest.mark.parametrize("variant", ["llama 1 and 2", "qwen2", "qwen3"])
def test_gguf_read_by_transformers(variant, tmp_path):
    config = peer_config(variant)
    if variant == "qwen3":
        config.head_dim = 128  # which transformers takes for granted
    random_peer(config).save_pretrained(tmp_path)
    model = qj.load(tmp_path)
    save_gguf(tmp_path / "m.gguf", model, kind="f32")
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, **EAGER
    )
    given = batch("whole")
    ours, theirs = logits(model, model.params, given), peer_logits(peer.eval(), given)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a little",
    "def fibonacci(n):",
    "Water boils at",
    "The three primary colours are",
    "To be or not to be,",
    "1, 1, 2, 3, 5, 8,",
    "The opposite of hot is",
    "My favourite animal is the",
    "In 1969, humans first",
)


def answers(model: qj.Model, params: Any = None) -> list[list[int]]:
    prompts = [model.tokenizer(text)["input_ids"] for text in PROMPTS]
    return generate(model, prompts, Sampling(max_new_tokens=16), params=params)


@pytest.mark.slow
def test_smollm2_through_every_format(tmp_path):
    """SmolLM2-135M out to each format and back: the same greedy answers to ten prompts."""
    dense = qj.load(smollm2.gguf())
    save_pretrained(tmp_path / "safetensors", dense, dtype=jnp.float32)
    save_gguf(tmp_path / "half.gguf", dense)
    expected = answers(dense)
    assert answers(qj.load(tmp_path / "safetensors")) == expected
    half = qj.load(tmp_path / "half.gguf")
    assert half.config == dense.config
    assert half.tokenizer.chat_template == dense.tokenizer.chat_template
    assert answers(half) == expected
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "safetensors", **EAGER)
    (tmp_path / "bin").mkdir()
    peer.config.save_pretrained(tmp_path / "bin")
    dense.tokenizer.save_pretrained(tmp_path / "bin")
    torch.save(peer.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    assert answers(qj.load(tmp_path / "bin")) == expected
    # 8 bits change the weights, and some answers with them, but only once.
    save_gguf(tmp_path / "eight.gguf", dense, kind="q8_0")
    eight = qj.load(tmp_path / "eight.gguf")
    once = answers(eight)
    save_gguf(tmp_path / "again.gguf", eight, kind="q8_0")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "eight.gguf").read_bytes()
    assert answers(qj.load(tmp_path / "again.gguf")) == once
    four = qj.load(smollm2.gguf(), quantization=qj.NF4())
    save_bitsandbytes(tmp_path / "bnb", four)
    back = qj.load(tmp_path / "bnb")
    assert answers(back) == answers(four)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bnb", **EAGER)
    name = "model.layers.7.mlp.up_proj.weight"
    weight = four.params["layers"]["mlp"]["up_proj"]["kernel"].dequantize()[7]
    np.testing.assert_array_equal(numbers(peer)[name], np.asarray(weight).T)
