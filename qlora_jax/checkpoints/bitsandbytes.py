"""4-bit folders of transformers with bitsandbytes, whose codes and scales are taken over as is."""

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qlora_jax.checkpoints.names import Parameter, parameters
from qlora_jax.checkpoints.quant_state import QuantState
from qlora_jax.checkpoints.tensors import SafetensorsFolder
from qlora_jax.errors import QloraError
from qlora_jax.models.typed import entry
from qlora_jax.quant import Policy, QuantConfig, QuantizedArray, bnb, quantize

logger = logging.getLogger("qlora_jax.load")
METHOD = "bitsandbytes"
# Any of these types may carry the bytes (bnb_4bit_quant_storage).
_STORAGE = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4}
_STATE = re.compile(r"(?P<weight>.+)\.quant_state\.bitsandbytes__\w+")


class BitsandbytesFolder(SafetensorsFolder):
    """Safetensors among which linear weights are packed in 4 bits, each with its scales beside it.

    about: `quantization_config` of config.json. `read` gives packed weights as QuantizedArray, bit
    for bit, with two exceptions, each logged as a warning: where K is no multiple of the block, a
    weight is quantized anew; and a leaf of which some layers are in 4 bits and others dense, or in
    other 4 bits, becomes dense as a whole. Raises QloraError for 8-bit folders, for packed weights
    that are not whole, and if nothing is in 4 bits.
    """

    def __init__(self, folder: Path, config: Any, about: Mapping[str, Any]) -> None:
        if not entry(about, "load_in_4bit", bool, False):
            raise QloraError(f"{folder}: bitsandbytes' 8 bits are not supported; only its 4 bits")
        super().__init__(folder)
        self._states = self._read_states()
        if not self._states:
            raise QloraError(
                f"{folder}: config.json speaks of 4 bits (quantization_config), but no tensor is; "
                "if the weights are dense, delete that entry"
            )
        beside = {f"{n}.{part}" for n, s in self._states.items() for part in (*s.parts(), s.key)}
        self._visible = {n: shape for n, shape in self._shapes.items() if n not in beside}
        self._visible |= {name: state.shape for name, state in self._states.items()}
        self._dense: set[str] = set()
        self._warned = False
        for parameter in parameters(config):
            self._place(parameter)

    def check(self, asked: QuantConfig | None, policy: Policy | None) -> None:
        """Raises QloraError if the weights are to be in other 4 bits, or others of them."""
        for name, state in self._states.items():
            if asked not in (None, state.format):
                raise QloraError(
                    f"{self.source}: {name} is already quantized as {state.format}, cannot become "
                    f"{asked}; load it as it is, or quantize the checkpoint that it was made of"
                )
        if policy is not None:
            raise QloraError(
                f"{self.source}: a policy cannot choose what is quantized already; leave it out"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._visible

    def not_floating(self) -> dict[str, str]:
        kinds = super().not_floating()
        return {n: kind for n, kind in kinds.items() if n not in self._states}

    def read(self, parameter: Parameter, layer: int) -> np.ndarray | QuantizedArray:
        name = self.name(parameter, layer)
        state = self._states.get(name)
        if state is None:
            return super().read(parameter, layer)
        tensors = self._take(name, state)
        about = (
            state.shape,
            state.format.codebook,
            state.format.block_size,
            jnp.dtype(state.dtype),
        )
        if parameter.path in self._dense:
            dense = bnb.dense_from_bitsandbytes(tensors, *about)
            return dense.T if _turned(parameter) else dense
        if not state.whole_blocks:
            dense = bnb.dense_from_bitsandbytes(tensors, *about)
            return quantize(jnp.asarray(dense.T), state.format, name=name)
        return bnb.from_bitsandbytes(tensors, *about)

    def _read_states(self) -> dict[str, QuantState]:
        """By the packed weight's name; QloraError that lists all that are not whole."""
        found: dict[str, QuantState] = {}
        faults: list[str] = []
        for name, stored in self._stored.items():
            if not (match := _STATE.fullmatch(name)):
                continue
            try:
                state = QuantState.from_bytes(stored.read())
            except QloraError as error:
                faults.append(f"{name}: {error}")
                continue
            found[match["weight"]] = state
            faults += self._faults(match["weight"], name, state)
        if faults:
            raise QloraError(
                f"{self.source}: the packed weights are not whole:\n  " + "\n  ".join(faults)
            )
        return found

    def _faults(self, weight: str, name: str, state: QuantState) -> list[str]:
        """What is missing beside a packed weight, or of another type or size."""
        faults = [f"{name}: is of {state.format}"] if not name.endswith(state.key) else []
        for suffix, (kind, size) in state.parts().items():
            part = f"{weight}.{suffix}"
            have = self._kind_and_size(part)
            if have != (kind, size):
                faults.append(f"{part}: {have[1]} of type {have[0]}, expected {size} of {kind}")
        kind, size = self._kind_and_size(weight)
        if size * _STORAGE.get(kind or "", 0) != (wanted := -(-math.prod(state.shape) // 2)):
            faults.append(f"{weight}: {size} of type {kind}, expected {wanted} bytes of codes")
        return faults

    def _kind_and_size(self, name: str) -> tuple[str | None, int]:
        """Of a tensor its type and how many numbers it has; (None, 0) if it is not there."""
        stored = self._stored.get(name)
        return (stored.kind, math.prod(stored.shape)) if stored else (None, 0)

    def _place(self, parameter: Parameter) -> None:
        """Finds out what of one leaf cannot be taken over."""
        names = [self.name(parameter, layer) for layer in range(parameter.layers)]
        states = {name: self._states[name] for name in names if name in self._states}
        if not states:
            return
        if _turned(parameter):
            self._visible |= {name: state.shape[::-1] for name, state in states.items()}
        kinds = {(state.format, state.dtype) for state in states.values()}
        first = next(iter(states.values()))
        if not parameter.kernel or len(states) < len(names) or len(kinds) > 1:
            self._dense.add(parameter.path)
            logger.warning(
                "%s: becomes dense: %d of its %d tensors are in 4 bits, of %d kinds",
                parameter.hf_module,
                len(states),
                len(names),
                len(kinds),
            )
        elif not first.whole_blocks:
            logger.warning(
                "%s: quantized anew: its %d inputs are no multiple of the block of %d",
                parameter.hf_module,
                first.shape[1],
                first.format.block_size,
            )

    def _take(self, name: str, state: QuantState) -> dict[str, np.ndarray]:
        """The stored tensors of one weight, by the names that `quant.bnb` has for them."""
        tensors = {}
        for suffix in ("", *(f".{part}" for part in state.parts())):
            x = self._stored[name + suffix].read()
            # Codes are put into another order anyway; what is kept as it is must be a copy.
            tensors[suffix[1:] or "packed"] = np.array(x) if suffix else x
        for suffix, table in state.tables().items():
            self._compare(f"{name}.{suffix}", tensors.pop(suffix), table)
        for suffix, x in tensors.items():
            if suffix != "packed" and not np.isfinite(x).all():
                raise QloraError(f"{name}.{suffix}: not finite; check the checkpoint")
        packed = np.ascontiguousarray(tensors["packed"]).reshape(-1)
        tensors["packed"] = packed.view(np.uint8)
        if state.offset is not None:
            tensors["nested_offset"] = np.asarray(state.offset, np.float32)
        return tensors

    def _compare(self, name: str, theirs: np.ndarray, ours: np.ndarray) -> None:
        """Codes are only taken over if they stand for the same numbers here."""
        if not np.allclose(theirs, ours, rtol=1e-6, atol=1e-12):
            raise QloraError(f"{name}: codes stand for other numbers than they do here")
        # Computed tables depend on the machine, as our constants do not.
        if not self._warned and not np.array_equal(theirs, ours):
            self._warned = True
            logger.warning("%s: differs in the last bits from the table that is used here", name)


def _turned(parameter: Parameter) -> bool:
    """Whether dense files hold a kernel as [in, out], where packed ones have [out, in] like all."""
    return parameter.kernel and not parameter.transposed
