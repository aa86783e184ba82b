"""Which parameters of a tree are quantized."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.errors import QloraError
from qlora_jax.quant import (
    NF4,
    Policy,
    QuantizedArray,
    dequantize_tree,
    is_quantized,
    path_str,
    quantize_tree,
)

TREE = {
    "embed_tokens": {"embedding": np.ones((32, 64), np.float32)},
    "layers": {
        "input_layernorm": {"scale": np.ones((2, 64), np.float32)},
        "self_attn": {
            "q_proj": {
                "kernel": np.ones((2, 64, 64), np.float32),
                "bias": np.ones((2, 64), np.float32),
            }
        },
    },
    "lm_head": {"kernel": np.ones((64, 32), np.float32)},
}


def quantized_paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantized)
    return {path_str(path) for path, leaf in leaves if is_quantized(leaf)}


def test_default_takes_the_linear_kernels_but_the_head():
    tree = quantize_tree(TREE, NF4())
    assert quantized_paths(tree) == {"layers/self_attn/q_proj/kernel"}
    assert tree["lm_head"]["kernel"] is TREE["lm_head"]["kernel"]


def test_experts_are_taken_and_their_router_is_not():
    tree = {
        "mlp": {
            "router": {"kernel": np.ones((2, 64, 4), np.float32)},
            "experts": {"up_proj": {"kernel": np.ones((2, 4, 64, 32), np.float32)}},
        }
    }
    quantized = quantize_tree(tree, NF4())
    assert quantized_paths(quantized) == {"mlp/experts/up_proj/kernel"}
    assert quantized["mlp"]["experts"]["up_proj"]["kernel"].batch_shape == (2, 4)


@pytest.mark.parametrize(
    ("module", "taken"),
    [
        *((name, False) for name in ("conv", "Conv_0", "conv1", "ConvTranspose_0", "conv_stem")),
        *((name, False) for name in ("stem_conv", "convs/0", "router", "router_0", "Router_0")),
        *((name, True) for name in ("converter", "Converter_0", "convex", "conv/up", "router_up")),
    ],
)
def test_convolutions_and_routers_are_known_by_flax_s_names(module, taken):
    assert Policy().selects(f"layers/{module}/kernel", (3, 64, 64)) == taken


def test_own_patterns():
    policy = Policy(include=r".*(kernel|embedding)", exclude=r"layers/.*")
    assert quantized_paths(quantize_tree(TREE, NF4(), policy)) == {
        "embed_tokens/embedding",
        "lm_head/kernel",
    }


def test_axes_by_pattern():
    policy = Policy(axes={r".*/query/kernel": (1, 2), r".*/out/kernel": (2, 1)})
    tree = {"a": {"query": {"kernel": np.ones((64, 4, 16), np.float32)}}}
    w = quantize_tree(tree, NF4(), policy)["a"]["query"]["kernel"]
    assert (w.batch_shape, w.k_shape, w.n_shape) == ((), (64,), (4, 16))
    assert not policy.selects("a/query/kernel", (64, 4)), "too few axes to be such a kernel"


def test_abstract_tree_and_quantized_leaves():
    abstract = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, TREE))
    tree = quantize_tree(abstract, NF4())
    w = tree["layers"]["self_attn"]["q_proj"]["kernel"]
    assert isinstance(w, QuantizedArray) and isinstance(w.codes, jax.ShapeDtypeStruct)
    real = quantize_tree(TREE, NF4())
    assert jax.tree.structure(real) == jax.tree.structure(tree)
    again = quantize_tree(real, NF4(32))
    assert again["layers"]["self_attn"]["q_proj"]["kernel"].block_size == 64


def test_dequantize_tree_is_dense_everywhere():
    dense = dequantize_tree(quantize_tree(TREE, NF4()))
    assert jax.tree.map(jnp.shape, dense) == jax.tree.map(jnp.shape, TREE)
    assert not quantized_paths(dense)


def test_non_finite_parameter_is_named():
    bad = jax.tree.map(np.copy, TREE)
    bad["layers"]["self_attn"]["q_proj"]["kernel"][1, 3, 4] = np.nan
    with pytest.raises(QloraError, match=r"layers/self_attn/q_proj/kernel: 1 of 8192"):
        quantize_tree(bad, NF4())
