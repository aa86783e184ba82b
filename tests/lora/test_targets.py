"""Which parameters a configuration means."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from qlora_jax import lora
from qlora_jax.errors import QloraError
from qlora_jax.lora import LoraConfig
from qlora_jax.lora.targets import module_name, select_full, select_targets
from qlora_jax.quant import NF4, Policy, quantize_tree

LINEAR = {
    "layers/self_attn/q_proj/kernel": (2, 64, 64),
    "layers/self_attn/v_proj/kernel": (2, 64, 32),
    "layers/mlp/up_proj/kernel": (2, 64, 96),
}
SHAPES = LINEAR | {
    "embed_tokens/embedding": (80, 64),
    "layers/self_attn/q_proj/bias": (2, 64),
    "layers/input_layernorm/scale": (2, 64),
    "norm/scale": (64,),
    "lm_head/kernel": (64, 80),
}


def chosen(targets: Any, shapes: dict[str, tuple[int, ...]] = SHAPES) -> set[str]:
    return set(select_targets(shapes, LoraConfig(targets=targets)))


def params() -> dict[str, Any]:
    """SHAPES as a nested tree of zeros."""
    tree: dict[str, Any] = {}
    for path, shape in SHAPES.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jnp.zeros(shape)
    return tree


@pytest.mark.parametrize(
    ("path", "module"),
    (
        ("layers/mlp/up/kernel", "layers.mlp.up"),
        ("embed_tokens/embedding", "embed_tokens"),
        ("experts/w1", "experts.w1"),
        ("norm/scale", "norm.scale"),
        ("kernel", ""),
    ),
)
def test_module_name(path: str, module: str) -> None:
    assert module_name(path) == module


def test_all_linear_leaves_out_head_and_embedding() -> None:
    """And biases and norm scales, which are matrices only because layers are stacked."""
    assert chosen("all-linear") == set(LINEAR)


@pytest.mark.parametrize("head", ("lm_head", "embed_out", "score", "classifier"))
def test_all_linear_leaves_out_heads_by_any_name(head: str) -> None:
    shapes = {"model/dense/kernel": (4, 4), f"model/{head}/kernel": (4, 4)}
    assert chosen("all-linear", shapes) == {"model/dense/kernel"}


@pytest.mark.parametrize("module", ("Conv_0", "conv_stem", "router_0"))
def test_all_linear_leaves_out_convolutions_and_routers(module: str) -> None:
    assert chosen("all-linear", SHAPES | {f"{module}/kernel": (3, 64, 64)}) == set(LINEAR)


def test_all_linear_without_linear_kernels_is_an_error() -> None:
    with pytest.raises(QloraError, match="all-linear.*embed_tokens"):
        chosen("all-linear", {"embed_tokens/embedding": (80, 64)})


@pytest.mark.parametrize(
    ("targets", "expected"),
    (
        (("q_proj",), {"layers/self_attn/q_proj/kernel"}),
        (("self_attn.q_proj",), {"layers/self_attn/q_proj/kernel"}),
        (("layers.self_attn.q_proj",), {"layers/self_attn/q_proj/kernel"}),
        (("q_proj", "up_proj"), {"layers/self_attn/q_proj/kernel", "layers/mlp/up_proj/kernel"}),
        (("lm_head",), {"lm_head/kernel"}),
        (("embed_tokens",), {"embed_tokens/embedding"}),
    ),
)
def test_names_are_suffixes(targets: tuple[str, ...], expected: set[str]) -> None:
    assert chosen(targets) == expected


@pytest.mark.parametrize("target", ("proj", "_proj", "attn.q_proj", "self_attn", "q_pro", "q.proj"))
def test_part_of_a_name_is_no_suffix(target: str) -> None:
    """A name in a tuple is no regular expression either ("q.proj")."""
    with pytest.raises(QloraError, match="matches no module"):
        chosen((target,))


@pytest.mark.parametrize(
    ("targets", "expected"),
    (
        (r".*\.[qv]_proj", {p for p in LINEAR if "self_attn" in p}),
        (r"layers\.mlp\..*", {"layers/mlp/up_proj/kernel"}),
        ("lm_head|embed_tokens", {"lm_head/kernel", "embed_tokens/embedding"}),
        (r"layers\..*", set(LINEAR)),
    ),
)
def test_a_string_is_a_regular_expression_for_the_whole_name(
    targets: str, expected: set[str]
) -> None:
    assert chosen(targets) == expected


@pytest.mark.parametrize("targets", ("proj", "layers", ".*norm.*", ".*bias"))
def test_regular_expression_that_matches_nothing(targets: str) -> None:
    """It must match the whole name or what follows a dot; biases and norm scales are no modules."""
    with pytest.raises(QloraError, match="matches no module"):
        chosen(targets)


def test_each_unmatched_target_is_an_error_that_lists_the_modules() -> None:
    """Also when another one matches: a misspelt name must not go unnoticed."""
    with pytest.raises(QloraError) as caught:
        chosen(("q_proj", "w_proj"))
    message = str(caught.value)
    assert "'w_proj'" in message
    modules = {module_name(path) for path in (*LINEAR, "embed_tokens/embedding", "lm_head/kernel")}
    assert message.partition("there are: ")[2].split(", ") == sorted(modules)


def test_patterns_that_match_no_adapted_module_are_listed() -> None:
    """A misspelt name, PEFT's name of a single layer, and a module that gets no adapter."""
    lost = {"q_prj": 2, r"layers\.0\.self_attn\.q_proj": 2, "layers.1.mlp.up_proj": 2, "lm_head": 2}
    for setting in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(QloraError) as caught:
            lora.init(jax.random.key(0), params(), LoraConfig(**{setting: {"v_proj": 4, **lost}}))
        message = str(caught.value)
        assert "layers are stacked" in message and "v_proj:" not in message
        assert all(f"{setting}: {pattern}\n" in message for pattern in lost)
        assert message.endswith(", ".join(sorted(map(module_name, LINEAR))))


def test_patterns_that_match_set_ranks() -> None:
    config = LoraConfig(rank=4, rank_pattern={"layers.mlp.up_proj": 2, r".*\.[qv]_proj": 3})
    adapters = lora.init(jax.random.key(0), params(), config)
    assert {path: w.rank for path, w in adapters.items()} == {
        path: 2 if "up_proj" in path else 3 for path in LINEAR
    }


def test_no_targets_at_all() -> None:
    with pytest.raises(QloraError, match="nothing to train"):
        chosen(())
    config = LoraConfig(targets=(), modules_to_save=("norm",))
    assert list(lora.init(jax.random.key(0), params(), config)) == ["norm/scale"]


def test_select_full_takes_everything_below_a_module() -> None:
    assert select_full(SHAPES, ("lm_head",)) == ["lm_head/kernel"]
    assert set(select_full(SHAPES, ("q_proj",))) == {p for p in SHAPES if "q_proj" in p}
    assert set(select_full(SHAPES, ("layers",))) == {p for p in SHAPES if p.startswith("layers")}
    assert select_full(SHAPES, ("norm", "norm.scale")) == ["norm/scale"]


def test_select_full_does_not_match_parts_of_names() -> None:
    """ "norm" is not input_layernorm."""
    assert select_full(SHAPES, ("norm",)) == ["norm/scale"]
    with pytest.raises(QloraError, match="'head' matches no module.*lm_head"):
        select_full(SHAPES, ("head",))
    tied = [path for path in SHAPES if not path.startswith("lm_head")]
    with pytest.raises(QloraError, match="train in full 'lm_head'.*tied head is the table of emb"):
        select_full(tied, ("lm_head",))


def test_modules_to_save_are_trained_in_full() -> None:
    """As fp32, whatever the parameter's dtype, and starting from its values."""
    tree = params()
    tree["lm_head"]["kernel"] = jnp.full((64, 80), 1.5, jnp.bfloat16)
    config = LoraConfig(modules_to_save=("lm_head", "norm"))
    adapters = lora.init(jax.random.key(0), tree, config)
    assert set(adapters) == {*LINEAR, "lm_head/kernel", "norm/scale"}
    head = adapters["lm_head/kernel"]
    assert isinstance(head, jax.Array) and head.dtype == jnp.float32
    assert bool(jnp.all(head == 1.5))
    assert adapters["norm/scale"].shape == (64,)


def test_module_that_is_target_and_saved_is_refused() -> None:
    config = LoraConfig(targets=("q_proj",), modules_to_save=("self_attn.q_proj",))
    with pytest.raises(QloraError, match="layers/self_attn/q_proj/kernel.*choose one"):
        lora.init(jax.random.key(0), params(), config)


def test_quantized_module_cannot_be_saved() -> None:
    quantized = quantize_tree(params(), NF4(), Policy(exclude=".*q_proj.*"))
    config = LoraConfig(targets=("q_proj",), modules_to_save=("lm_head",))
    with pytest.raises(QloraError, match="lm_head/kernel.*quantized.*policy"):
        lora.init(jax.random.key(0), quantized, config)
    # Not quantized by the default policy.
    adapters = lora.init(jax.random.key(0), quantize_tree(params(), NF4()), config)
    assert set(adapters) == {"layers/self_attn/q_proj/kernel", "lm_head/kernel"}
