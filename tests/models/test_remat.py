"""The policies by name: what each keeps of a layer, and that none changes a result."""

import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as qj
from qlora_jax import models
from qlora_jax.models import abstract_params, bind, read_config
from qlora_jax.models.remat import Name, RematPolicy, rematerialized
from tests.lift.oracle import equations

LAYERS, TIME, WIDTH, HIDDEN, HEADS, KV_HEADS = 3, 10, 32, 72, 4, 2
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
}
OTHERS: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8},
    "gpt2": {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 32},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"pad_token_id": 0},
    "bert": {"max_position_embeddings": 32, "architectures": ["BertForMaskedLM"]},
    "deberta-v2": {
        "max_position_embeddings": 32,
        "architectures": ["DebertaV2ForMaskedLM"],
        "relative_attention": True,
        "pos_att_type": "c2p",
    },
    "t5": {"d_model": WIDTH, "d_kv": 8, "d_ff": HIDDEN, "num_layers": LAYERS, "num_heads": HEADS},
}
CONFIG = read_config(LLAMA)
IDS = jax.random.randint(jax.random.key(1), (1, TIME), 0, 50)

INPUT = ATTENDED = (1, TIME, WIDTH)
QUERY, KEY = (1, TIME, HEADS, WIDTH // HEADS), (1, TIME, KV_HEADS, WIDTH // HEADS)
NAMES = [INPUT, QUERY, KEY, KEY, ATTENDED]
WIDE = 2 * [(1, TIME, HIDDEN)]
# What attention gives its projection, and its log-sum-exp of scores.
OUTPUT, SUMS = (1, TIME, WIDTH), (1, KV_HEADS, HEADS // KV_HEADS, TIME)
KEPT = {
    "none": [*NAMES, *WIDE, OUTPUT, SUMS],
    "dots": [*NAMES, *WIDE],
    "names": NAMES,
    "full": [INPUT],
    "offload": NAMES,
}


def total(params: Any, remat: Any) -> jax.Array:
    return jnp.sum(models.apply(CONFIG, params, IDS, remat=remat)[0] ** 2)


@pytest.mark.parametrize("policy", get_args(RematPolicy))
def test_what_is_kept_of_each_layer(policy: str) -> None:
    """The outputs of the forward scan are what the backward one gets."""
    params = abstract_params(CONFIG)
    jaxpr = jax.make_jaxpr(jax.grad(functools.partial(total, remat=policy)))(params)
    forward = next(eqn for eqn in equations(jaxpr) if eqn.primitive.name == "scan")
    made: list[Any] = [var.aval for var in forward.outvars]
    kept = [x for x in made if x.shape[:2] == (LAYERS, 1)]
    assert sorted(x.shape[1:] for x in kept) == sorted(KEPT[policy])
    on_host = [x.memory_space == jax.memory.Space.Host for x in kept]
    assert all(on_host) if policy == "offload" else not any(on_host)


def test_no_policy_changes_a_result() -> None:
    params = models.init_params(CONFIG, jax.random.key(0))
    run = jax.jit(jax.value_and_grad(total), static_argnums=1)
    loss, gradient = run(params, "none")
    assert float(loss) > 1
    for policy in ("full", "dots", "names", "offload"):
        other, found = run(params, policy)
        np.testing.assert_allclose(other, loss, rtol=1e-6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, gradient
        )


@pytest.mark.parametrize("family", OTHERS)
def test_every_family_names_what_policies_keep(family: str) -> None:
    config = read_config(LLAMA | {"model_type": family, **OTHERS[family]})

    def run(params: Any, ids: jax.Array) -> jax.Array:
        model = bind(config, params, jnp.float32)
        if family == "t5":
            return model.decode(ids, model.encode(ids, remat=True), remat=True)
        hidden = model.hidden(ids, remat=True)
        return hidden[0] if isinstance(hidden, tuple) else hidden

    jaxpr = jax.make_jaxpr(run)(abstract_params(config), IDS)
    named = [eqn.params["name"] for eqn in equations(jaxpr) if eqn.primitive.name == "name"]
    assert set(named) == set(get_args(Name))


def test_true_and_false_are_full_and_none() -> None:
    def step(carry: Any, x: Any) -> Any:
        return carry, x

    assert rematerialized(step, False) is step
    jaxpr = jax.make_jaxpr(rematerialized(step, True))(1.0, 2.0)
    assert [eqn.params["policy"] for eqn in jaxpr.eqns] == [None]
    with pytest.raises(qj.QloraError, match="none, full, dots, names, offload, got 'some'"):
        rematerialized(step, "some")  # type: ignore[arg-type]
