"""Which parameters of a tree are quantized, and how their axes are read."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax

from qlora_jax.quant.array import QuantizedArray, quantize
from qlora_jax.quant.config import QuantConfig
from qlora_jax.quant.placement import Placement

LINEAR_KERNEL = r"(.*/)?kernel"
"""Paths of the kernels of flax's linear layers."""

OUTPUT_HEAD = r"(.*/)?(lm_head|embed_out|output_head|score|pooler|classifier)/.*"
"""Paths of output heads, with what pools for them: small next to the rest, most hurt by rounding,
and often new, so that they are to be trained in full."""

CONVOLUTION = r"(.*/)?(\w+_)?[Cc]onvs?([A-Z0-9_]\w*)?(/\d+)?/kernel"
"""Paths of a convolution's kernel, whose blocks would run over its window: conv, Conv_0, conv1,
ConvTranspose_0, conv_stem, stem_conv, convs/0, but no word that only begins so (converter)."""

ROUTER = r"(.*/)?[Rr]outer(_?\d+)?/.*"
"""Paths of the routers of mixtures of experts: tiny, and rounding one sends tokens elsewhere."""


@dataclasses.dataclass(frozen=True)
class Policy:
    """Selects parameters by path ("layers/mlp/up_proj/kernel"), by whole-path regular expressions.

    include / exclude: the default takes every linear kernel, those of stacked experts too, but not
    output heads, convolutions and routers; embeddings are no kernels. axes: path pattern ->
    (contracted axes, output axes) for kernels that are not [..., K, N], e.g.
    {r".*/query/kernel": (1, 2)}; the first pattern that matches counts.
    """

    include: str = LINEAR_KERNEL
    exclude: str = f"{OUTPUT_HEAD}|{CONVOLUTION}|{ROUTER}"
    axes: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

    def selects(self, path: str, shape: tuple[int, ...]) -> bool:
        """Whether the parameter of this path and shape is quantized."""
        if len(shape) < sum(self.axes_of(path)):
            return False
        return bool(re.fullmatch(self.include, path)) and not re.fullmatch(self.exclude, path)

    def axes_of(self, path: str) -> tuple[int, int]:
        return next((v for p, v in self.axes.items() if re.fullmatch(p, path)), (1, 1))


def path_str(path: Any) -> str:
    """A key path of jax.tree_util as "a/b/c", without the "value" of an nnx.Param."""
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_quantized(x: Any) -> bool:
    return isinstance(x, QuantizedArray)


def quantize_tree(params: Any, config: QuantConfig, policy: Policy | None = None) -> Any:
    """The tree with every selected leaf quantized; abstract leaves give abstract results."""
    policy = policy or Policy()

    def one(path: Any, leaf: Any) -> Any:
        name = path_str(path)
        if is_quantized(leaf) or not policy.selects(name, leaf.shape):
            return leaf
        return quantize(leaf, config, name=name, axes=policy.axes_of(name))

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_quantized)


def dequantize_tree(params: Any) -> Any:
    """The tree with every QuantizedArray made dense."""
    return jax.tree.map(
        lambda x: x.dequantize() if is_quantized(x) else x, params, is_leaf=is_quantized
    )


def placement_of(params: Any) -> Placement | None:
    """Where a quantized leaf of `params` lies on a mesh; None without one."""
    for leaf in jax.tree.leaves(params, is_leaf=is_quantized):
        if is_quantized(leaf) and leaf.placement is not None:
            return leaf.placement
    return None


def batch_parts(params: Any) -> int:
    """Into how many parts the examples of a batch are split over devices, as `placement_of` says;
    1 without a mesh."""
    placement = placement_of(params)
    return 1 if placement is None else placement.count(placement.rows)
