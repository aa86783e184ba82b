"""GGUF files: configuration and tensors. Quantized tensors are dequantized by the gguf package."""

import math
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from qlora_jax.checkpoints.gguf_header import Tensor, read_header
from qlora_jax.checkpoints.names import Parameter
from qlora_jax.errors import QloraError, missing
from qlora_jax.models import LlamaConfig, RopeConfig, read_config
from qlora_jax.models.rope import inverse_frequencies
from qlora_jax.models.typed import checked

T = TypeVar("T", int, float)
ROPE_FACTORS = "rope_freqs.weight"
# SmolLM3's files do not say which layers are rotated; it is all but every fourth, as by default.
_ARCHITECTURES = ("llama", "qwen2", "qwen3", "smollm3")
_INTEGERS = ("I8", "I16", "I32", "I64")
# All that is understood of what shapes attention; anything else there would change the model.
_KNOWN = {
    "attention": (
        "head_count",
        "head_count_kv",
        "key_length",
        "value_length",
        "layer_norm_rms_epsilon",
        "sliding_window",
    ),
    "rope": (
        "dimension_count",
        "freq_base",
        "scaling.type",
        "scaling.factor",
        "scaling.original_context_length",
        "scaling.finetuned",  # whether the model was trained with the scaling: for the record
    ),
}


class GGUFFile:
    """A GGUF file of the Llama family. Raises QloraError for any other or a damaged one."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ModuleNotFoundError as error:
            raise missing("gguf", f"reading {path}", "hf") from error
        self.source = str(path)
        header = read_header(path)
        self._fields, self._tensors = header.fields, header.tensors
        self._formats, self._kinds = gguf.quants, gguf.GGMLQuantizationType
        self._data = np.memmap(path, mode="r")
        for name, tensor in self._tensors.items():
            self._check(name, tensor)
        if (parts := self._number("split.count", int, 1)) > 1:
            raise QloraError(
                f"{path}: one of {parts} parts of a split file; make one file of them by "
                "`llama-gguf-split --merge FIRST-PART WHOLE`"
            )
        self.architecture = str(self.field("general.architecture"))
        self.config = self._read_config()

    def field(self, key: str, default: Any = None) -> Any:
        """A metadata entry, or `default`: a number, a text, or a list of one of them. Raises
        QloraError for text that is not UTF-8."""
        value = self._fields.get(key, default)
        if isinstance(value, np.ndarray):
            return value.tolist()
        if any(isinstance(x, bytes) for x in (value if isinstance(value, list) else [value])):
            raise QloraError(f"{self.source}: the metadata entry {key} is not UTF-8")
        return value

    def number(self, key: str, kind: type[T], default: T | None = None) -> T:
        """A metadata entry of the architecture that is a number. Raises QloraError if it is not."""
        return self._number(f"{self.architecture}.{key}", kind, default)

    def _number(self, name: str, kind: type[T], default: T | None) -> T:
        value = self.field(name, default)
        if value is None:
            raise QloraError(f"{self.source}: the metadata entry {name} is missing")
        try:
            return checked(name, value, kind)
        except QloraError as error:
            raise QloraError(f"{self.source}: {error}") from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def not_floating(self) -> dict[str, str]:
        # Q4_K, IQ2_XS and the like are formats of floating-point numbers.
        kinds = {name: self._kinds(t.kind).name for name, t in self._tensors.items()}
        return {name: kind for name, kind in kinds.items() if kind in _INTEGERS}

    def name(self, parameter: Parameter, layer: int) -> str:
        return parameter.gguf_name(layer)

    def read(self, parameter: Parameter, layer: int) -> np.ndarray:
        values = self._values(parameter.gguf_name(layer))
        return rows_from_gguf(values.reshape(parameter.file_shape), self.config, parameter)

    def ignorable(self, name: str) -> bool:
        return name == ROPE_FACTORS

    def _check(self, name: str, tensor: Tensor) -> None:
        """Raises QloraError for a tensor of no known type, or whose data are not all there."""
        if tensor.kind not in set(self._kinds):
            raise QloraError(
                f"{self.source}: {name!r} has the type {tensor.kind}, which this version of the "
                "gguf package does not know; a newer one may"
            )
        try:
            end = tensor.start + math.prod(self._stored_shape(tensor))
        except ValueError as error:
            raise QloraError(
                f"{self.source}: cannot be read as GGUF ({name!r}: {error})"
            ) from error
        if end > len(self._data):
            raise QloraError(
                f"{self.source}: cannot be read as GGUF ({name!r} ends at byte {end} of "
                f"{len(self._data)}); incomplete download?"
            )

    def _stored_shape(self, tensor: Tensor) -> tuple[int, ...]:
        """As bytes."""
        return self._formats.quant_shape_to_byte_shape(tensor.shape, self._kinds(tensor.kind))

    def _values(self, name: str) -> np.ndarray:
        """fp32."""
        tensor = self._tensors[name]
        shape = self._stored_shape(tensor)
        stored = self._data[tensor.start : tensor.start + math.prod(shape)].reshape(shape)
        try:
            return self._formats.dequantize(stored, self._kinds(tensor.kind))
        except NotImplementedError as error:
            raise QloraError(f"{self.source}: {name}: {error} in the gguf package") from error

    def _read_config(self) -> LlamaConfig:
        arch = self.architecture
        if arch not in _ARCHITECTURES:
            raise QloraError(
                f"{self.source}: architecture {arch!r} is not supported; known: "
                f"{', '.join(_ARCHITECTURES)}"
            )

        if "token_embd.weight" not in self._tensors:
            raise QloraError(f"{self.source}: no token_embd.weight; is this a whole model?")
        self._refuse_unknown()
        if isinstance(self.field(f"{arch}.attention.head_count"), list):
            raise QloraError(f"{self.source}: head counts that differ by layer are not supported")
        heads, width = (
            self.number("attention.head_count", int),
            self.number("embedding_length", int),
        )
        head_dim = self.number("attention.key_length", int, width // max(heads, 1))
        for key in ("rope.dimension_count", "attention.value_length"):
            if (other := self.field(f"{arch}.{key}", head_dim)) != head_dim:
                raise QloraError(
                    f"{self.source}: {arch}.{key} is {other}, the size of a head {head_dim}; "
                    "only equal ones are supported"
                )
        context = self.number("context_length", int)
        window = self._window(context)
        hf = {
            "model_type": arch if window is None else "mistral",
            "vocab_size": self.shapes()["token_embd.weight"][0],
            "hidden_size": width,
            "intermediate_size": self.number("feed_forward_length", int),
            "num_hidden_layers": self.number("block_count", int),
            "num_attention_heads": heads,
            "num_key_value_heads": self.number("attention.head_count_kv", int, heads),
            "head_dim": head_dim,
            "max_position_embeddings": context,
            "sliding_window": window,
            "rms_norm_eps": _shortest(self.number("attention.layer_norm_rms_epsilon", float)),
            "attention_bias": "blk.0.attn_output.bias" in self._tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in self._tensors,
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "bos_token_id": self.field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.field("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.field("tokenizer.ggml.padding_token_id"),
        }
        theta = _shortest(self.number("rope.freq_base", float, 10000.0))
        hf["rope_parameters"] = {"rope_theta": theta, **self._rope(theta, head_dim, context)}
        try:
            return read_config(hf)
        except QloraError as error:
            raise QloraError(f"{self.source}: {error}") from error

    def _refuse_unknown(self) -> None:
        """Settings of attention that are not in `_KNOWN`."""
        for group, known in _KNOWN.items():
            prefix = f"{self.architecture}.{group}."
            unknown = [
                key
                for key in self._fields
                if key.startswith(prefix) and key.removeprefix(prefix) not in known
            ]
            if unknown:
                values = ", ".join(f"{key} = {self.field(key)}" for key in unknown)
                raise QloraError(f"{self.source}: not supported: {values}")

    def _window(self, context: int) -> int | None:
        """The window of attention, which Mistral has: its files are of the architecture llama."""
        window = self.number("attention.sliding_window", int, 0)
        if not window or window >= context:
            return None
        if self.architecture != "llama":
            raise QloraError(
                f"{self.source}: a sliding window of {window} is not supported: the file does not "
                "say which layers have it"
            )
        return window

    def _rope(self, theta: float, head_dim: int, context: int) -> dict[str, Any]:
        arch = self.architecture
        if ROPE_FACTORS in self._tensors:
            return self._llama3_rope(theta, head_dim)
        kind = self.field(f"{arch}.rope.scaling.type", "none")
        if kind == "none":
            return {"rope_type": "default"}
        if kind not in ("linear", "yarn"):
            raise QloraError(f"{self.source}: rope scaling {kind!r} is not supported")
        rope = {"rope_type": kind, "factor": self.field(f"{arch}.rope.scaling.factor")}
        if kind == "yarn":
            original = self.field(f"{arch}.rope.scaling.original_context_length", context)
            rope["original_max_position_embeddings"] = original
        return rope

    def _llama3_rope(self, theta: float, head_dim: int) -> dict[str, Any]:
        """Llama 3's scaling: files hold what it divides each frequency by, not its settings."""
        divisors = self._values(ROPE_FACTORS).reshape(-1)
        # All Llama 3.x share these; `factor`, the largest divisor, is 8 or 32.
        settings = {
            "factor": float(divisors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        plain, _ = inverse_frequencies(RopeConfig(theta=theta), head_dim)
        scaled, _ = inverse_frequencies(RopeConfig("llama3", theta, **settings), head_dim)
        if divisors.shape != plain.shape or not np.allclose(plain / divisors, scaled, rtol=1e-4):
            raise QloraError(f"{self.source}: {ROPE_FACTORS} is not Llama 3's rope scaling")
        return {"rope_type": "llama3", **settings}


def rows_from_gguf(x: np.ndarray, config: LlamaConfig, parameter: Parameter) -> np.ndarray:
    """One tensor of a file with its rows in the order of Hugging Face."""
    if not (heads := _rotated_heads(config, parameter)):
        return x
    pairs = x.reshape(heads, -1, 2, *x.shape[1:])
    return np.ascontiguousarray(np.swapaxes(pairs, 1, 2)).reshape(x.shape)


def rows_for_gguf(x: np.ndarray, config: LlamaConfig, parameter: Parameter) -> np.ndarray:
    """The inverse of `rows_from_gguf`."""
    if not (heads := _rotated_heads(config, parameter)):
        return x
    halves = x.reshape(heads, 2, -1, *x.shape[1:])
    return np.ascontiguousarray(np.swapaxes(halves, 1, 2)).reshape(x.shape)


def _rotated_heads(config: LlamaConfig, parameter: Parameter) -> int:
    """How many heads the rows are of, if they are ordered otherwise than with Hugging Face, or 0.

    Files of the architectures llama and smollm3 pair neighbouring rows for the rotation, where
    Hugging Face pairs the two halves of a head.
    """
    if config.model_type not in ("llama", "mistral", "smollm3"):
        return 0
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return heads.get(parameter.path.split("/")[-2], 0)


def _shortest(x: float) -> float:
    """An fp32 number as it was written: 1e-5, not 9.999999747378752e-06."""
    return float(str(np.float32(x)))
