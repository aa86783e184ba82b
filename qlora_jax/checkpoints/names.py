"""What each parameter is called: here, in Hugging Face's files, in PEFT's and in GGUF.

One table, read in both directions.
"""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from qlora_jax.models import LlamaConfig, llama
from qlora_jax.quant import path_str

# Our module -> (Hugging Face, GGUF); {} is the number of the layer.
_LLAMA = {
    "embed_tokens": ("model.embed_tokens", "token_embd"),
    "norm": ("model.norm", "output_norm"),
    "lm_head": ("lm_head", "output"),
    "layers/input_layernorm": ("model.layers.{}.input_layernorm", "blk.{}.attn_norm"),
    "layers/post_attention_layernorm": (
        "model.layers.{}.post_attention_layernorm",
        "blk.{}.ffn_norm",
    ),
    "layers/self_attn/q_proj": ("model.layers.{}.self_attn.q_proj", "blk.{}.attn_q"),
    "layers/self_attn/k_proj": ("model.layers.{}.self_attn.k_proj", "blk.{}.attn_k"),
    "layers/self_attn/v_proj": ("model.layers.{}.self_attn.v_proj", "blk.{}.attn_v"),
    "layers/self_attn/o_proj": ("model.layers.{}.self_attn.o_proj", "blk.{}.attn_output"),
    "layers/self_attn/q_norm": ("model.layers.{}.self_attn.q_norm", "blk.{}.attn_q_norm"),
    "layers/self_attn/k_norm": ("model.layers.{}.self_attn.k_norm", "blk.{}.attn_k_norm"),
    "layers/mlp/gate_proj": ("model.layers.{}.mlp.gate_proj", "blk.{}.ffn_gate"),
    "layers/mlp/up_proj": ("model.layers.{}.mlp.up_proj", "blk.{}.ffn_up"),
    "layers/mlp/down_proj": ("model.layers.{}.mlp.down_proj", "blk.{}.ffn_down"),
}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One leaf of the parameter tree, and where it is found in files.

    path       "layers/self_attn/q_proj/kernel"
    shape      of the leaf, the layers in front where `stacked`
    kernel     whether files hold it as [out, in], the transpose of ours
    hf_module  "model.layers.{}.self_attn.q_proj", also PEFT's name for it
    gguf_module
    suffix     "weight" or "bias", as files have it
    """

    path: str
    shape: tuple[int, ...]
    kernel: bool
    hf_module: str
    gguf_module: str
    suffix: str

    @property
    def stacked(self) -> bool:
        return "{}" in self.hf_module

    @property
    def layers(self) -> int:
        """How many tensors of a file make up the leaf."""
        return self.shape[0] if self.stacked else 1

    @property
    def file_shape(self) -> tuple[int, ...]:
        """The shape of one of its tensors in a file."""
        one = self.shape[1:] if self.stacked else self.shape
        return one[::-1] if self.kernel else one

    def hf_name(self, layer: int) -> str:
        return f"{self.hf_module.format(layer)}.{self.suffix}"

    def gguf_name(self, layer: int) -> str:
        return f"{self.gguf_module.format(layer)}.{self.suffix}"

    def to_file(self, x: np.ndarray) -> np.ndarray:
        """One layer's weight from ours to the file's order of axes, or back."""
        return x.T if self.kernel else x


def parameters(config: LlamaConfig) -> Iterator[Parameter]:
    """Every leaf of the model's parameter tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(llama.abstract_params(config))
    for path, leaf in leaves:
        name = path_str(path)
        module, _, kind = name.rpartition("/")
        hf, gguf = _LLAMA[module]
        suffix = "bias" if kind == "bias" else "weight"
        yield Parameter(name, tuple(leaf.shape), kind == "kernel", hf, gguf, suffix)
