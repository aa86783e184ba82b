"""`qlora-jax convert`: a checkpoint from one format to another."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from qlora_jax import lora
from qlora_jax.checkpoints import peft
from qlora_jax.checkpoints.bitsandbytes_export import save_bitsandbytes
from qlora_jax.checkpoints.export import save_pretrained
from qlora_jax.checkpoints.folder import check_new
from qlora_jax.checkpoints.gguf_export import save_gguf
from qlora_jax.checkpoints.json_files import read_json
from qlora_jax.checkpoints.load import is_four_bit, load, load_lazily, locate
from qlora_jax.checkpoints.model import Model
from qlora_jax.checkpoints.names import OnTensor
from qlora_jax.commands.classes import head_of, with_labels
from qlora_jax.commands.progress import counting
from qlora_jax.errors import QloraError
from qlora_jax.quant import QuantConfig

Target = Literal["safetensors", "bitsandbytes", "gguf-f32", "gguf-f16", "gguf-bf16", "gguf-q8_0"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a checkpoint in another format, one tensor after the other."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A checkpoint folder (safetensors, .bin, 4 bits by bitsandbytes or by `quantize`), a .gguf
    file, or a model's name on the Hugging Face hub."""
    dest: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")]
    """What to write: a folder, which must not exist or be empty; for gguf a new file."""
    to: Target
    """safetensors: dense, for transformers. bitsandbytes: 4 bits, for transformers. gguf: for
    llama.cpp."""
    adapter: Path | None = None
    """Folder of a PEFT adapter to add into the weights; not into 4 bits."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of the weights that are dense, in a folder; auto: what the source's config.json says,
    float16 for a .gguf file."""
    quant_type: Literal["nf4", "fp4"] = "nf4"
    """For bitsandbytes, if the source is not in 4 bits yet: the code book."""
    block_size: int = 64
    """Likewise: weights that share a scale."""
    double_quant: bool = True
    """Likewise: store the scales in 8 bits."""

    def run(self) -> None:
        """Writes the checkpoint. Raises QloraError as `load` and the functions that write do."""
        if self.to == "bitsandbytes" and self.adapter is not None:
            raise QloraError(
                "--adapter cannot be added into 4 bits, which would round it away; convert to "
                "safetensors, or keep the adapter beside the 4-bit model"
            )
        self._check_dest()
        save = self._writer()
        with counting() as begin:
            model = self._read(begin)
            params = model.params
            if self.adapter is not None:
                params = lora.attach(params, peft.load(self.adapter, model)[0])
                model = with_labels(model, self.adapter)
            save(self.dest, model, params, on_tensor=begin("writing"))
        print(f"{self.source} as {self.to} in {self.dest}")

    def _check_dest(self) -> None:
        """Raises QloraError if `dest` is there, or, where a folder is written, not empty."""
        if not self.to.startswith("gguf"):
            check_new(self.dest)
        elif self.dest.is_dir():
            raise QloraError(f"{self.dest}: a folder; --to {self.to} writes one file, name it")
        elif self.dest.exists():
            raise QloraError(f"{self.dest}: already there; choose another name, or delete it first")

    def _writer(self) -> Callable[..., None]:
        if self.to == "safetensors":
            return functools.partial(save_pretrained, dtype=self._dtype())
        if self.to == "bitsandbytes":
            return functools.partial(save_bitsandbytes, dtype=self._dtype())
        kind: Any = self.to.removeprefix("gguf-")
        return functools.partial(save_gguf, kind=kind)

    def _read(self, begin: Callable[[str], OnTensor]) -> Model:
        """All is read while it is written, a tensor at a time, except what is in 4 bits already."""
        if self.adapter is not None and (head := head_of(self.adapter)):
            return load(self.source, dtype=self._dtype(), on_tensor=begin("reading"), **head)
        if self.to != "bitsandbytes":
            return load_lazily(self.source)
        if is_four_bit(self.source):  # keeps its codes
            return load(self.source, dtype=self._dtype(), on_tensor=begin("reading"))
        form = QuantConfig(self.quant_type, self.block_size, self.double_quant)
        return load_lazily(self.source, quantization=form)

    def _dtype(self) -> str:
        if self.dtype != "auto":
            return self.dtype
        source = locate(self.source)
        if source.is_file():
            return "float16"
        about = read_json(source / "config.json")
        stated = about.get("dtype") or about.get("torch_dtype")
        return stated if stated in ("bfloat16", "float16", "float32") else "bfloat16"
