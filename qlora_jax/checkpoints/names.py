"""What each parameter is called: here, in Hugging Face's files, in PEFT's and in GGUF.

The families' tables, read in both directions.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from qlora_jax.models import DecoderConfig, abstract_params, family_of
from qlora_jax.quant import path_str

# Of the Llama family: what Hugging Face calls a module -> what GGUF calls it.
_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.{}.input_layernorm": "blk.{}.attn_norm",
    "model.layers.{}.post_attention_layernorm": "blk.{}.ffn_norm",
    "model.layers.{}.self_attn.q_proj": "blk.{}.attn_q",
    "model.layers.{}.self_attn.k_proj": "blk.{}.attn_k",
    "model.layers.{}.self_attn.v_proj": "blk.{}.attn_v",
    "model.layers.{}.self_attn.o_proj": "blk.{}.attn_output",
    "model.layers.{}.self_attn.q_norm": "blk.{}.attn_q_norm",
    "model.layers.{}.self_attn.k_norm": "blk.{}.attn_k_norm",
    "model.layers.{}.mlp.gate_proj": "blk.{}.ffn_gate",
    "model.layers.{}.mlp.up_proj": "blk.{}.ffn_up",
    "model.layers.{}.mlp.down_proj": "blk.{}.ffn_down",
}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One leaf of the parameter tree, and where it is found in files.

    path        "layers/self_attn/q_proj/kernel"
    shape       of the leaf, with the axes in front along which it is stacked
    transposed  whether files hold the axes in the reverse order, as they do of a linear kernel
    hf_module   "model.layers.{}.self_attn.q_proj", also PEFT's name for it; a {} for every axis
                along which the leaf is stacked
    suffix      "weight" or "bias", as files have it
    aliases     what else files may call the module
    numbers     of the layers along the first of these axes, where it does not hold all layers of
                the model; empty: they are numbered from 0 on

    A layer, here and below, is one of the tensors in files that make up the leaf; they are counted
    through where it is stacked along several axes (layers and experts), the last going fastest.
    """

    path: str
    shape: tuple[int, ...]
    transposed: bool
    hf_module: str
    suffix: str
    aliases: tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()

    @property
    def kernel(self) -> bool:
        """Whether it is the kernel of a linear layer."""
        return self.path.endswith("/kernel")

    @property
    def stack(self) -> tuple[int, ...]:
        """The axes in front."""
        return self.shape[: self.hf_module.count("{}")]

    @property
    def stacked(self) -> bool:
        return bool(self.stack)

    @property
    def layers(self) -> int:
        """How many tensors of a file make up the leaf."""
        return math.prod(self.stack)

    def at(self, layer: int) -> tuple[int, ...]:
        """Where in the leaf a layer stands: its index along each axis of `stack`."""
        return tuple(int(i) for i in np.unravel_index(layer, self.stack)) if self.stack else ()

    @property
    def file_shape(self) -> tuple[int, ...]:
        """The shape of one of its tensors in a file."""
        one = self.shape[len(self.stack) :]
        return one[::-1] if self.transposed else one

    def module(self, layer: int) -> str:
        """Hugging Face's and PEFT's name of the module that a layer is in."""
        return self._numbered(self.hf_module, layer)

    def hf_name(self, layer: int) -> str:
        return f"{self.module(layer)}.{self.suffix}"

    def hf_names(self, layer: int) -> list[str]:
        """Every name that a file may have for it, the usual one first."""
        names = (self.hf_module, *self.aliases)
        return [f"{self._numbered(name, layer)}.{self.suffix}" for name in names]

    def gguf_name(self, layer: int) -> str:
        return f"{self._numbered(_GGUF[self.hf_module], layer)}.{self.suffix}"

    def _numbered(self, name: str, layer: int) -> str:
        """The name with the numbers that files have for the layer in place of its {}."""
        at = self.at(layer)
        return name.format(self.numbers[at[0]], *at[1:]) if self.numbers else name.format(*at)

    def to_file(self, x: np.ndarray) -> np.ndarray:
        """One layer's weight from ours to the file's order of axes, or back."""
        return x.T if self.transposed else x


def parameters(config: Any) -> Iterator[Parameter]:
    """Every leaf of the model's parameter tree."""
    family = family_of(config)
    stacks = config.stacks if isinstance(config, DecoderConfig) else {}
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract_params(config))
    for path, leaf in leaves:
        name = path_str(path)
        module, _, kind = name.rpartition("/")
        suffix = "bias" if kind == "bias" else "weight"
        transposed = kind == "kernel" and module.rpartition("/")[2] not in family.as_stored
        hf_module = _hf_module(family.names, module)
        aliases = tuple(
            other + hf_module.removeprefix(begin)
            for begin, others in family.prefixes.items()
            if hf_module.startswith(begin)
            for other in others
        )
        of = tuple(stacks.get(name.partition("/")[0], ()))
        numbers = of if of != tuple(range(len(of))) else ()
        yield Parameter(name, tuple(leaf.shape), transposed, hf_module, suffix, aliases, numbers)


OnTensor = Callable[[int], None]
"""Called when a tensor of a file was read or written, with how many there are in all."""


Place = Callable[[Any, str, Any], Any]
"""place(config, path, leaf): the parameter at `path`, or a layer or the shapes of it, put where it
is to lie. All processes call it alike, each keeping its own part."""


def count_tensors(config: Any) -> int:
    """How many tensors a dense file of the model has."""
    return sum(parameter.layers for parameter in parameters(config))


def _hf_module(names: Any, module: str) -> str:
    """The longest entry that the module's path starts with, and what follows it."""
    prefix = module
    while prefix not in names:
        prefix = prefix.rpartition("/")[0]
        if not prefix:
            raise KeyError(f"the family's table has no name for {module}")
    return names[prefix] + module.removeprefix(prefix).replace("/", ".")
