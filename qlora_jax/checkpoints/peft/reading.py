"""What reading any of PEFT's adapters has in common: tensors sorted by module, faults listed."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.checkpoints.any_model import AnyModel
from qlora_jax.checkpoints.names import Parameter, parameters
from qlora_jax.checkpoints.peft.description import MAGNITUDE, is_target, texts
from qlora_jax.checkpoints.peft.target_names import is_inside
from qlora_jax.checkpoints.peft.tied import EMBEDDING, is_tied, peft_ties
from qlora_jax.checkpoints.tensors import fault_of
from qlora_jax.errors import QloraError
from qlora_jax.lora import Adapters
from qlora_jax.lora.tree import named_leaves
from qlora_jax.quant import QuantizedArray

_BASE = ".base_layer.weight"
_KEY = re.compile(
    r"(?P<module>.+)\.(?P<what>lora_A\.weight|lora_B\.weight|lora_embedding_[AB]|"
    rf"{MAGNITUDE}|vera_lambda_[bd])"
)

Layers = dict[int, dict[str, np.ndarray]]
"""Number of a layer -> its tensors, by what they are."""


class Reading:
    """Tensors of a file collected into adapters, with everything that does not fit."""

    def __init__(self, about: Mapping[str, Any], model: AnyModel) -> None:
        self.about, self.model = about, model
        self.adapters: Adapters = {}
        self.faults: list[str] = []
        self._modules: dict[str, tuple[Parameter, int]] = {}
        self._names: dict[str, tuple[Parameter, int]] = {}
        for parameter in parameters(model.config):
            for layer in range(parameter.layers):
                self._names[parameter.hf_name(layer)] = parameter, layer
                if parameter.path.endswith(("/kernel", "/embedding")):
                    self._modules[parameter.module(layer)] = parameter, layer
        self._factors: dict[Parameter, Layers] = {}
        self._full: dict[Parameter, dict[int, np.ndarray]] = {}

    def parts(self, parameter: Parameter) -> dict[str, str]:
        """What the tensors of an adapter of the parameter are called in files -> what they are."""
        raise NotImplementedError

    def adapter_of(self, parameter: Parameter, layers: Layers, leaf: Any) -> Any:
        """The adapter that was taken for a parameter, `leaf`; None if it has faults."""
        raise NotImplementedError

    def complete(self) -> None:
        """What all adapters together need."""

    def config(self) -> Any:
        """The configuration by which `lora.init` would make such adapters."""
        raise NotImplementedError

    def take(self, name: str, x: np.ndarray) -> None:
        if name.endswith(_BASE) and (owner := self._modules.get(name.removesuffix(_BASE))):
            self._check_base(name, x, *owner)
            return
        match = _KEY.fullmatch(name)
        owner = self._modules.get(match["module"]) if match else self._names.get(name)
        if owner is None:
            self.faults.append(f"{name}: the model has no such module")
            return
        if fault := fault_of(x):
            self.faults.append(f"{name}: {fault}")
        parameter, layer = owner
        if match is None:
            self._full.setdefault(parameter, {})[layer] = x
        elif part := self.parts(parameter).get(match["what"]):
            self._factors.setdefault(parameter, {}).setdefault(layer, {})[part] = x
        else:
            self.faults.append(f"{name}: not what an adapter of this module is called")

    def _check_base(self, name: str, x: np.ndarray, parameter: Parameter, layer: int) -> None:
        """PEFT writes the table of an adapted embedding too, in case it was resized."""
        leaf = named_leaves(self.model.params)[parameter.path]
        if x.shape != parameter.file_shape:
            self.faults.append(
                f"{name}: has shape {x.shape}, the model's own is {parameter.file_shape}; a "
                "vocabulary that was resized is not read"
            )
        elif isinstance(leaf, jax.Array | np.ndarray):
            own = parameter.to_file(np.asarray(leaf[parameter.at(layer)], np.float32))
            if not np.allclose(x.astype(np.float32), own, rtol=1e-2, atol=1e-3):
                self.faults.append(f"{name}: not the model's own, and trained by no adapter")

    def _compare_with_description(self) -> None:
        """What was taken against what adapter_config.json names: neither more nor less."""
        for module, (parameter, layer) in self._modules.items():
            here = layer in self._factors.get(parameter, {})
            if here != is_target(self.about, module, parameter):
                self.faults.append(
                    f"{module}: has an adapter, which target_modules or layers_to_transform exclude"
                    if here
                    else f"{module}: missing, an adapter that target_modules names"
                )
        full = texts(self.about, "modules_to_save")
        for name, (parameter, layer) in self._names.items():
            module = parameter.module(layer)
            named = module.endswith(tuple(full)) or any(is_inside(module, name) for name in full)
            if layer in self._full.get(parameter, {}) or not named:
                continue
            self.faults.append(f"{name}: missing, of a module that modules_to_save names")

    def finish(self, folder: Path) -> None:
        self._compare_with_description()
        leaves = named_leaves(self.model.params)
        for parameter, layers in self._factors.items():
            adapter = self.adapter_of(parameter, layers, leaves[parameter.path])
            if adapter is not None:
                self.adapters[parameter.path] = adapter
        for parameter, layers in self._full.items():
            self._finish_full(parameter, layers, leaves[parameter.path])
        self.complete()
        if not self.adapters and not self.faults:
            self.faults.append("no adapter at all in the file")
        if self.faults:
            raise QloraError(
                f"{folder}: the adapter does not fit the model:\n  " + "\n  ".join(self.faults)
            )

    def _finish_full(self, parameter: Parameter, layers: dict[int, np.ndarray], leaf: Any) -> None:
        before = len(self.faults)
        for layer, x in layers.items():
            if x.shape != parameter.file_shape:
                name = parameter.hf_name(layer)
                self.faults.append(f"{name}: {x.shape}, expected {parameter.file_shape}")
        if lost := set(range(parameter.layers)) - set(layers):
            self.faults.append(f"{parameter.hf_module}: trained in full, but not layers {lost}")
        if isinstance(leaf, QuantizedArray):
            self.faults.append(
                f"{parameter.path}: trained in full but quantized here; load the model with a "
                "quantization policy that excludes it"
            )
        if parameter.path == EMBEDDING and self.head_apart():
            self.faults.append(
                f"{parameter.hf_module}: trained in full and apart from the head that this model "
                "ties to it"
            )
        if len(self.faults) > before:
            return
        ours = [parameter.to_file(layers[i].astype(np.float32)) for i in range(parameter.layers)]
        whole = np.stack(ours).reshape(parameter.shape)
        self.adapters[parameter.path] = jnp.asarray(whole)

    def complete_layers(self, parameter: Parameter, layers: Layers) -> Layers:
        """Those that have all their tensors; that others have not is a fault."""
        needs = list(self.parts(parameter).values())
        both = f"both {' and '.join(needs)}" if len(needs) == 2 else ", ".join(needs)
        complete = {layer: parts for layer, parts in layers.items() if set(parts) == set(needs)}
        self.faults += [
            f"{parameter.module(layer)}: has {'/'.join(sorted(parts))}, needs {both}"
            for layer, parts in layers.items()
            if layer not in complete
        ]
        return complete

    def need_all(self, parameter: Parameter, layers: Layers, kind: str) -> None:
        """That some layers have no adapter is a fault; LoRA alone can leave layers out."""
        lost = sorted(set(range(parameter.layers)) - set(layers))
        if lost:
            self.faults.append(
                f"{parameter.hf_module}: {kind} of some layers only is not supported; there is "
                f"none of {', '.join(map(parameter.module, lost))}"
            )

    def in_full(self) -> tuple[str, ...]:
        """Our names of what is trained in full."""
        return tuple(
            path.replace("/", ".")
            for path, adapter in self.adapters.items()
            if isinstance(adapter, jax.Array)
        )

    def head_apart(self) -> bool:
        """Whether embedding and head, which the model ties, are adapted each on its own."""
        if not is_tied(self.model):
            return False
        return not (self.about.get("ensure_weight_tying") and peft_ties(self.model))
