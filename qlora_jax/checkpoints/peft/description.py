"""adapter_config.json: what is read of it, what is refused, and which modules it names."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_jax.checkpoints.names import Parameter
from qlora_jax.errors import QloraError
from qlora_jax.models.typed import checked, entry, needed

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OLD_WEIGHTS = "adapter_model.bin"
"""What torch.save wrote; read where torch is installed and there are no safetensors."""
PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
PROJECTION_A, PROJECTION_B = "base_model.vera_A", "base_model.vera_B"
# What PEFT can do that we cannot; its value where it does nothing.
_UNSUPPORTED = {
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
    "layer_replication": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "use_bdlora": None,
    "arrow_config": None,
}


# Kinds of init_lora_weights that PEFT takes out of the base weight when it loads an adapter.
_CHANGING_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_supported(about: Mapping[str, Any], where: Path, *, conv1d: bool) -> None:
    """Raises QloraError for what is neither LoRA nor VeRA, for what they are made to do that is
    not supported, and for settings of wrong types.

    conv1d: whether the model's files hold weights as [in, out]. PEFT then sets fan_in_fan_out,
    whatever a person has asked for.
    """
    if about.get("peft_type") not in ("LORA", "VERA"):
        raise QloraError(
            f"{where}: peft_type is {about.get('peft_type')!r}; only LORA and VERA are supported"
        )
    usual = {"fan_in_fan_out"} if conv1d else set()
    used = [
        key
        for key, off in _UNSUPPORTED.items()
        if key not in usual and about.get(key, off) not in (off, None)
    ]
    if used:
        settings = ", ".join(f"{key}={about[key]!r}" for key in used)
        raise QloraError(f"{where}: not supported: {settings}")
    init = about.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_CHANGING_THE_BASE):
        raise QloraError(
            f"{where}: init_lora_weights={init!r}: the adapter belongs to a base that was changed "
            "along with it. Save it in PEFT with path_initial_model_for_weight_conversion; or, if "
            "the model loaded here is that changed base, set init_lora_weights to true"
        )
    try:
        _check_types(about)
    except (QloraError, re.error) as error:
        raise QloraError(f"{where}: {error}") from error


def _check_types(about: Mapping[str, Any]) -> None:
    """Everything that is used below, so that it may be used without asking again."""
    needed(about, "r", int)
    if about["peft_type"] == "LORA":
        needed(about, "lora_alpha", float)
    entry(about, "lora_dropout", float)
    entry(about, "use_rslora", bool)
    entry(about, "use_dora", bool)
    entry(about, "ensure_weight_tying", bool)
    entry(about, "vera_dropout", float)
    entry(about, "d_initial", float)
    entry(about, "projection_prng_key", int)
    entry(about, "save_projection", bool)
    for key, kind in (("rank_pattern", int), ("alpha_pattern", float)):
        for pattern, value in entry(about, key, Mapping, {}).items():
            re.compile(pattern)
            checked(f"{key}[{pattern!r}]", value, kind)
    for name, rank in {"r": about["r"], **(about.get("rank_pattern") or {})}.items():
        if rank < 1:
            raise QloraError(f"the rank {name} is {rank}, expected at least 1")
    if about.get("target_modules") is None and not about.get("target_parameters"):
        raise QloraError("target_modules is missing; expected a list of names, or a pattern")
    names = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
    for key in (*names, "target_parameters"):
        for name in texts(about, key):
            re.compile(name)
    layers = about.get("layers_to_transform")
    for layer in layers if isinstance(layers, list) else [layers]:
        if layer is not None:
            checked("layers_to_transform", layer, int)


def factor_names(parameter: Parameter) -> tuple[str, str]:
    """What the tensors of A and B are called in the module of a kernel or an embedding."""
    if parameter.kernel:
        return "lora_A.weight", "lora_B.weight"
    return "lora_embedding_A", "lora_embedding_B"


def texts(about: Mapping[str, Any], key: str) -> list[str]:
    """A list of text, which may also stand alone."""
    value = about.get(key)
    if value is None or isinstance(value, str):
        return [value] if value else []
    return [checked(key, name, str) for name in checked(key, value, list)]


def is_target(about: Mapping[str, Any], module: str, parameter: Parameter) -> bool:
    """PEFT's rule (tuners_utils.check_target_module_exists): whether `module` has factors."""
    excluded = about.get("exclude_modules")
    if excluded and _names_it(excluded, module):
        return False
    # What is trained in full, or lies inside of it, has no factors.
    if any(re.match(rf"(^|.*\.){m}($|\..*)", module) for m in texts(about, "modules_to_save")):
        return False
    targets = about["target_modules"]
    if targets == "all-linear":
        return parameter.kernel and module != "lm_head"
    if isinstance(targets, str) or module in targets or not _names_it(targets, module):
        return _names_it(targets, module)
    layers = about.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    names = texts(about, "layers_pattern") or [r"[^.]*"]
    found = (re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", module) for name in names)
    number = next((int(match[1]) for match in found if match), None)
    return number in (layers if isinstance(layers, list) else [layers])


def _names_it(names: Any, module: str) -> bool:
    """By PEFT: text is a pattern of the whole name, the texts of a list are ends of it."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return module in names or any(module.endswith(f".{name}") for name in names)
