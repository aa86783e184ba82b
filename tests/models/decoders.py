"""What every decoder has to do by itself; that its logits are transformers' is for tests/parity."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qlora_jax as qj
from qlora_jax import models
from qlora_jax.lora.adapters import named_leaves
from qlora_jax.models import Cache, abstract_params, read_config
from qlora_jax.quant.policy import is_quantized, path_str


def check_config(hf: Mapping[str, Any]) -> None:
    """A configuration survives its file."""
    config = read_config(hf)
    assert read_config(config.to_hf()) == config


def random_params(config: Any) -> Any:
    """Larger than when a model is new, and no norm or bias has the value that it then has."""
    rng = np.random.default_rng(0)

    def one(path: Any, leaf: Any) -> jax.Array:
        scale = path_str(path).endswith("/scale")
        return jnp.asarray(rng.normal(float(scale), 0.08, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, abstract_params(config))


def check_cache_and_packing(config: Any) -> None:
    """A sequence gives the same logits whole, piece by piece, and beside another in one row."""
    params = random_params(config)
    ids = jax.random.randint(jax.random.key(1), (2, 12), 0, config.vocab_size)
    apply = jax.jit(functools.partial(models.apply, config))
    whole = np.asarray(apply(params, ids)[0])
    assert np.abs(whole).max() > 0.1

    cache, parts = Cache.create(config, 2, 12), []
    for start, stop in ((0, 8), (8, 12)):
        logits, cache = apply(params, ids[:, start:stop], cache=cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=0, atol=5e-5)

    segments = jnp.repeat(jnp.asarray([[5, 9]]), 12, axis=1)
    packed = apply(params, ids.reshape(1, 24), segment_ids=segments)[0]
    np.testing.assert_allclose(packed.reshape(whole.shape), whole, rtol=0, atol=5e-5)


def check_lora_step(config: Any) -> None:
    """The loss with adapters on 4-bit weights is that of both merged, and each adapter learns.

    Every linear layer has one, and so has the embedding; no weight is made dense on the way.
    """
    params = qj.quantize_tree(random_params(config), qj.NF4())
    linear = [path for path, x in named_leaves(params).items() if is_quantized(x)]
    assert len(linear) >= 4
    targets = tuple(path.removesuffix("/kernel").replace("/", ".") for path in linear)
    low_rank = qj.LoraConfig(rank=2, alpha=4, targets=(*targets, "embed_tokens"))
    adapters = qj.lora.init(jax.random.key(3), params, low_rank)
    adapters = jax.tree.map(lambda x: x + 0.02, adapters)
    model = qj.Model(config, params, None, "", jnp.float32)
    ids = jax.random.randint(jax.random.key(1), (2, 12), 0, config.vocab_size)
    fed = {"input_ids": ids, "labels": ids}

    def loss(adapters: Any) -> jax.Array:
        return model.loss(qj.lora.attach(params, adapters), fed)[0]

    found, gradients = jax.jit(jax.value_and_grad(loss))(adapters)
    dense = jax.jit(lambda adapters: model.loss(qj.lora.merge(params, adapters), fed)[0])
    np.testing.assert_allclose(found, dense(adapters), rtol=1e-5)
    for path, gradient in gradients.items():
        assert all(0 < float(jnp.abs(x).max()) < 1e3 for x in jax.tree.leaves(gradient)), path


def bytes_in_4bit(hf: Mapping[str, Any]) -> int:
    """Of the whole model in NF4 with double quantization, from shapes alone."""
    params = abstract_params(read_config(hf), jnp.bfloat16)
    params = qj.quantize_tree(params, qj.NF4(double_quant=True))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
