"""Adapters of stacked experts, as PEFT writes them, against the sum that PEFT defines."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import qlora_jax as qj
from qlora_jax import QloraError, models
from qlora_jax.checkpoints.model import Model

E, D, F, L, R = 3, 32, 16, 2, 4
SMALL = {
    "vocab_size": 40,
    "hidden_size": D,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
CONFIGS = {
    "mixtral": {"intermediate_size": F, "num_local_experts": E},
    "qwen3_moe": {"moe_intermediate_size": F, "num_experts": E},
}
SHAPES = {"gate_up_proj": (D, 2 * F), "down_proj": (F, D)}
BOTH = {"gate_up_proj": "experts.base_layer", "down_proj": "experts"}
ONE = {"down_proj": "experts"}


def make_model(family: str) -> Model:
    config = models.read_config({"model_type": family, **SMALL, **CONFIGS[family]})
    return Model(config, models.abstract_params(config), None, "random", jnp.float32)


def write(folder: Any, wrappers: dict[str, str], **changes: Any) -> dict[str, np.ndarray]:
    """An adapter of the parameters that `wrappers` names; what it adds to each, [L, E, in, out]."""
    rng, tensors = np.random.default_rng(0), {}
    added = {name: np.zeros((L, E, *SHAPES[name])) for name in wrappers}
    about = {
        "peft_type": "LORA",
        "r": R,
        "lora_alpha": 8,
        "target_modules": [],
        "target_parameters": list(wrappers),
        # The first is what is written here; the second PEFT adds; the others were of modules.
        "rank_pattern": {
            "(gate_up_proj)": 2 * R,
            r".*\.gate_up_proj": 3,
            "gate_proj": 1,
            "w1": 1,
        },
        "alpha_pattern": {"(gate_up_proj)": 12, r".*\.gate_up_proj": 3},
    } | changes
    for name, wrapper in wrappers.items():
        rank = 2 * R if name == "gate_up_proj" else R
        alpha = 12 if name == "gate_up_proj" else 8
        inner, outer = SHAPES[name]
        for layer in range(L):
            a = rng.normal(size=(E * rank, inner)).astype(np.float32)
            b = rng.normal(size=(outer, rank * E)).astype(np.float32)
            module = f"base_model.model.model.layers.{layer}.mlp.{wrapper}"
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            factors = b.reshape(outer, rank, E), a.reshape(E, rank, inner)
            added[name][layer] = np.einsum("ore,eri->eio", *factors) * alpha / rank
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return added


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("wrappers", [BOTH, ONE])
def test_every_expert_gets_its_own(family, wrappers, tmp_path):
    want = write(tmp_path, wrappers)
    if "gate_up_proj" in want:
        fused = want.pop("gate_up_proj")
        want |= {"gate_proj": fused[..., :F], "up_proj": fused[..., F:]}
    adapters, config = qj.peft.load(tmp_path, make_model(family))
    assert set(adapters) == {f"layers/mlp/experts/{name}/kernel" for name in want}
    for name, added in want.items():
        adapter = adapters[f"layers/mlp/experts/{name}/kernel"]
        np.testing.assert_allclose(
            adapter.a @ adapter.b * adapter.scaling, added, rtol=1e-4, atol=1e-4
        )
    # The configuration describes them: it makes the same shapes.
    again = jax.eval_shape(
        lambda key: qj.lora.init(key, make_model(family).params, config), jax.random.key(0)
    )
    assert {p: (x.a.shape, x.scaling) for p, x in again.items()} == {
        p: (x.a.shape, x.scaling) for p, x in adapters.items()
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_parameters": ["down_proj", "q_proj.weight"]}, r"\['q_proj.weight'\]"),
        ({"target_parameters": ["weight"]}, "experts.lora_A.weight: the model has no such module"),
        ({"alpha_pattern": {"layers.1.*down_proj": 3}}, "down_proj that differ among layers"),
        ({"r": 5}, "A .*expected"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message, tmp_path):
    write(tmp_path, ONE, **changes)
    with pytest.raises(QloraError, match=message):
        qj.peft.load(tmp_path, make_model("mixtral"))


def test_a_model_without_experts_has_none(tmp_path):
    write(tmp_path, ONE)
    config = models.read_config({"model_type": "llama", "intermediate_size": 64, **SMALL})
    model = Model(config, models.abstract_params(config), None, "random", jnp.float32)
    with pytest.raises(QloraError, match="not supported: target_parameters"):
        qj.peft.load(tmp_path, model)


def test_gate_and_up_share_a_scaling_with_peft(tmp_path):
    """Written with the rank and alpha of the fused parameter; refused if there is no one alpha."""
    model = make_model("mixtral")
    model = dataclasses.replace(model, params=models.init_params(model.config, jax.random.key(0)))
    config = qj.LoraConfig(rank=R, alpha=8, targets=("gate_proj", "up_proj"))
    adapters = qj.lora.init(jax.random.key(0), model.params, config)
    qj.peft.save(tmp_path / "same", adapters, model, config)
    about = json.loads((tmp_path / "same" / "adapter_config.json").read_text())
    assert about["target_modules"] == ["w1", "w3"]
    assert about["rank_pattern"] == {r"(experts\.gate_up_proj)": 2 * R}
    assert about["alpha_pattern"] == {r"(experts\.gate_up_proj)": 16}
    path = "layers/mlp/experts/up_proj/kernel"
    adapters[path] = dataclasses.replace(adapters[path], scaling=3.0)
    with pytest.raises(QloraError, match="gate_proj and up_proj of experts have the scalings"):
        qj.peft.save(tmp_path / "apart", adapters, model, config)
