"""LoRA and DoRA out of PEFT's tensors."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from qlora_jax.checkpoints.names import Parameter
from qlora_jax.checkpoints.peft.description import MAGNITUDE, factor_names
from qlora_jax.checkpoints.peft.experts import setting
from qlora_jax.checkpoints.peft.reading import Layers, Reading
from qlora_jax.checkpoints.peft.tied import EMBEDDING
from qlora_jax.lora import LoraConfig, LoraWeights, dora
from qlora_jax.lora.targets import module_name


class LoraReading(Reading):
    """Factors of each module, and under DoRA magnitudes."""

    @property
    def _dora(self) -> bool:
        return bool(self.about.get("use_dora"))

    def parts(self, parameter: Parameter) -> dict[str, str]:
        names = dict(zip(factor_names(parameter), ("A", "B"), strict=True))
        return names | ({MAGNITUDE: "magnitude"} if self._dora else {})

    def adapter_of(self, parameter: Parameter, layers: Layers, leaf: Any) -> LoraWeights | None:
        # Of a file's [out, in] weight; an embedding is [V, D] in files too, and A is over V.
        k, n = parameter.shape[len(parameter.stack) :]
        before = len(self.faults)
        if self._dora:
            self.need_all(parameter, layers, "DoRA")
        ranks: dict[int, int] = {}
        for layer, factors in self.complete_layers(parameter, layers).items():
            module = parameter.module(layer)
            a, b = factors["A"].shape, factors["B"].shape
            rank = setting(self.about, "r", module)
            if a != (rank, k) or b != (n, rank):
                self.faults.append(
                    f"{module}: A {a} and B {b}, expected {(rank, k)} and {(n, rank)}"
                )
            if self._dora and factors["magnitude"].shape != (n,):
                self.faults.append(
                    f"{module}: magnitude {factors['magnitude'].shape}, expected {(n,)}"
                )
            ranks[layer] = int(rank)
        if parameter.path == EMBEDDING:
            if self.head_apart():
                self.faults.append(
                    f"{parameter.hf_module}: the model's head is tied to its embedding, but the "
                    "adapter is of the embedding alone (trained without ensure_weight_tying)"
                )
            elif self._dora and self.model.config.tie_word_embeddings:
                self.faults.append(
                    f"{parameter.hf_module}: DoRA of an embedding that the head is tied to is "
                    "not supported"
                )
        if len(self.faults) > before:
            return None
        width = max(ranks.values())
        a = np.zeros((parameter.layers, k, width), np.float32)
        b = np.zeros((parameter.layers, width, n), np.float32)
        scaling = [0.0] * parameter.layers
        for layer, factors in layers.items():
            rank = ranks[layer]
            a[layer, :, :rank] = factors["A"].astype(np.float32).T
            b[layer, :rank] = factors["B"].astype(np.float32).T
            alpha = setting(self.about, "lora_alpha", parameter.module(layer))
            root = math.sqrt(rank) if self.about.get("use_rslora") else rank
            scaling[layer] = float(alpha) / root
        same = scaling[0] if len(set(scaling)) == 1 else tuple(scaling)
        a, b = (x.reshape(*parameter.stack, *x.shape[1:]) for x in (a, b))
        weights = LoraWeights(jnp.asarray(a), jnp.asarray(b), same)
        if not self._dora:
            return weights
        rows = [layers[layer]["magnitude"] for layer in range(parameter.layers)]
        magnitude = np.stack(rows).astype(np.float32).reshape(*parameter.stack, n)
        weights = dataclasses.replace(weights, magnitude=jnp.asarray(magnitude))
        return dora.with_norms_of(weights, leaf)

    def config(self) -> LoraConfig:
        about, rank, alpha = self.about, self.about["r"], self.about["lora_alpha"]
        low_rank = {
            module_name(path): adapter
            for path, adapter in self.adapters.items()
            if isinstance(adapter, LoraWeights)
        }
        config = LoraConfig(
            rank=rank,
            alpha=alpha,
            dropout=about.get("lora_dropout") or 0.0,
            rslora=about.get("use_rslora") or False,
            targets=tuple(low_rank),
            rank_pattern={n: w.rank for n, w in low_rank.items() if w.rank != rank},
            modules_to_save=self.in_full(),
            dora=self._dora,
        )
        alphas = {}
        for name, weights in low_rank.items():
            if isinstance(weights.scaling, float) and weights.scaling != config.scaling_of(name):
                root = math.sqrt(weights.rank) if config.rslora else weights.rank
                alphas[name] = weights.scaling * root
        return dataclasses.replace(config, alpha_pattern=alphas)
