"""VeRA out of PEFT's tensors."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from qlora_jax.checkpoints.any_model import AnyModel
from qlora_jax.checkpoints.names import Parameter
from qlora_jax.checkpoints.peft.description import PROJECTION_A, PROJECTION_B
from qlora_jax.checkpoints.peft.reading import Layers, Reading
from qlora_jax.checkpoints.tensors import fault_of
from qlora_jax.lora import VeraConfig, VeraProjections, VeraWeights
from qlora_jax.lora.targets import module_name
from qlora_jax.lora.vera import PROJECTIONS, draw_projections


class VeraReading(Reading):
    """Vectors of each module, and the matrices that all share."""

    def __init__(self, about: Mapping[str, Any], model: AnyModel) -> None:
        super().__init__(about, model)
        self._shared: dict[str, np.ndarray] = {}
        self._largest = (0, 0)

    def parts(self, parameter: Parameter) -> dict[str, str]:
        return {"vera_lambda_d": "d", "vera_lambda_b": "b"} if parameter.kernel else {}

    def take(self, name: str, x: np.ndarray) -> None:
        if name not in (PROJECTION_A, PROJECTION_B):
            super().take(name, x)
            return
        if fault := fault_of(x):
            self.faults.append(f"{name}: {fault}")
        self._shared[name] = x.astype(np.float32)

    def adapter_of(self, parameter: Parameter, layers: Layers, leaf: Any) -> VeraWeights | None:
        rank, (k, n) = self.about["r"], parameter.shape[len(parameter.stack) :]
        before = len(self.faults)
        self.need_all(parameter, layers, "VeRA")
        for layer, parts in self.complete_layers(parameter, layers).items():
            d, b = parts["d"].shape, parts["b"].shape
            if d != (rank,) or b != (n,):
                self.faults.append(
                    f"{parameter.module(layer)}: d {d} and b {b}, expected {(rank,)} and {(n,)}"
                )
        if len(self.faults) > before:
            return None
        self._largest = max(self._largest[0], k), max(self._largest[1], n)

        def stacked(part: str) -> Any:
            rows = [layers[layer][part].astype(np.float32) for layer in range(parameter.layers)]
            return jnp.asarray(np.stack(rows).reshape(*parameter.stack, -1))

        return VeraWeights(stacked("d"), stacked("b"))

    def complete(self) -> None:
        if any(isinstance(x, VeraWeights) for x in self.adapters.values()):
            self.adapters[PROJECTIONS] = self._projections()

    def _projections(self) -> VeraProjections | None:
        """The stored matrices, or those drawn anew; None if they have faults."""
        rank, (k, n) = self.about["r"], self._largest
        if not self.about.get("save_projection", True):
            return draw_projections(self.about.get("projection_prng_key") or 0, k, n, rank)
        a, b = self._shared.get(PROJECTION_A), self._shared.get(PROJECTION_B)
        if a is None or b is None:
            self.faults.append(f"{PROJECTION_A} and {PROJECTION_B}: needed with save_projection")
            return None
        fits = a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] == rank
        if not fits or a.shape[1] < k or b.shape[0] < n:
            self.faults.append(
                f"{PROJECTION_A} {a.shape} and {PROJECTION_B} {b.shape}, expected at least "
                f"{(rank, k)} and {(n, rank)}"
            )
            return None
        return VeraProjections(jnp.asarray(a.T), jnp.asarray(b.T))

    def config(self) -> VeraConfig:
        about = self.about
        return VeraConfig(
            rank=about["r"],
            d_initial=about.get("d_initial", 0.1),
            dropout=about.get("vera_dropout") or 0.0,
            targets=tuple(
                module_name(path) for path, x in self.adapters.items() if isinstance(x, VeraWeights)
            ),
            modules_to_save=self.in_full(),
            projection_prng_key=about.get("projection_prng_key") or 0,
            save_projection=about.get("save_projection", True),
        )
