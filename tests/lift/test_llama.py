"""The decoder we ship, small: nothing of it densifies, and it computes what the dense one does."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import lora, models
from qlora_jax.lift import lift
from qlora_jax.models import LlamaConfig
from qlora_jax.models import cache as caches
from tests.lift.oracle import RTOL, assert_close, check, densify, float_sizes, prepare

COMMON: dict[str, Any] = {
    "vocab_size": 80,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
VARIANTS = {
    "llama": {"model_type": "llama"},
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 3},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
}
LINEAR = ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj", "self_attn/o_proj")
MLP = ("mlp/gate_proj", "mlp/up_proj", "mlp/down_proj")
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 80, (2, 7)))


@functools.cache
def problem(variant: str, everything: bool) -> tuple[LlamaConfig, Any, dict[str, tuple[int, int]]]:
    config = LlamaConfig.from_hf({**COMMON, **VARIANTS[variant]})
    params = models.init_params(config, jax.random.key(0))
    # The default initialization is so small that softmax and tanh would be linear.
    params = jax.tree.map(lambda x: x * 4 if x.ndim > 2 else x, params)
    axes = {f"layers/{name}/kernel": (1, 1) for name in (*LINEAR, *MLP)}
    if everything:
        axes["embed_tokens/embedding"] = (1, 1)
        if not config.tie_word_embeddings:
            axes["lm_head/kernel"] = (1, 1)
    return config, params, axes


# Each variant once, and remat with and without, rather than all combinations.
@pytest.mark.parametrize(
    ("variant", "remat"),
    (("llama", False), ("llama", True), ("tied", False), ("mistral", True), ("qwen3", False)),
)
def test_logits_and_gradients(variant: str, remat: bool) -> None:
    config, params, axes = problem(variant, everything=False)
    fn = lambda p, ids: models.apply(config, p, ids, remat=remat)[0]  # noqa: E731
    check(fn, params, axes, IDS, bases=("nf4",), rtol=1e-4)


@pytest.mark.parametrize("variant", ("llama", "tied"))
def test_embedding_and_head_in_4_bits_too(variant: str) -> None:
    config, params, axes = problem(variant, everything=True)
    fn = lambda p, ids: models.apply(config, p, ids)[0]  # noqa: E731
    check(fn, params, axes, IDS, bases=("nf4",), rtol=1e-4)


def test_decoding_with_a_cache() -> None:
    config, params, axes = problem("llama", everything=False)
    frozen, adapters = prepare(params, axes, "nf4")
    apply = functools.partial(models.apply, config)
    step = jax.jit(lift(lambda p, ids, cache: apply(p, ids, cache=cache), strict=True))

    def decode(params: Any) -> jax.Array:
        cache = caches.Cache.create(config, batch=2, length=8, dtype=jnp.float32)
        first, cache = step(params, IDS[:, :4], cache)
        rest = []
        for i in range(4, 7):
            logits, cache = step(params, IDS[:, i : i + 1], cache)
            rest.append(logits)
        return jnp.concatenate([first, *rest], axis=1)

    got = decode(lora.attach(frozen, adapters))
    want = jax.jit(lambda p: apply(p, IDS)[0])(densify(frozen, adapters))
    assert_close(got, want, 1e-4, "logits")


def test_no_dense_stack_in_the_program() -> None:
    config, params, axes = problem("llama", everything=False)
    frozen, adapters = prepare(params, axes, "nf4")
    fn = lift(functools.partial(models.apply, config, remat=True), strict=True)

    def loss(a: Any) -> jax.Array:
        return jnp.sum(fn(lora.attach(frozen, a), IDS)[0] ** 2)

    stacks = {params["layers"]["mlp"][name]["kernel"].size for name in ("up_proj", "down_proj")}
    assert not stacks & float_sizes(jax.make_jaxpr(jax.grad(loss))(adapters))


def test_bfloat16_compute() -> None:
    config, params, axes = problem("llama", everything=False)
    frozen, adapters = prepare(params, axes, "nf4")
    fn = jax.jit(lift(functools.partial(models.apply, config, dtype=jnp.bfloat16), strict=True))
    got = fn(lora.attach(frozen, adapters), IDS)[0]
    want = jax.jit(lambda p: models.apply(config, p, IDS)[0])(densify(frozen, adapters))
    assert got.dtype == jnp.float32
    assert_close(got, want, 5e-2, "logits")
    assert float(jnp.max(jnp.abs(got - want)) / jnp.max(jnp.abs(want))) > RTOL  # bf16 was used
