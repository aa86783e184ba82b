"""The command line, `qlora-jax`."""

import dataclasses
import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.errors import QloraError, missing

COMMANDS = {
    "train": ("Train", "fine-tune a model on a data set"),
    "generate": ("Generate", "print or write a model's answers to prompts"),
    "chat": ("Chat", "talk to a model in the terminal"),
    "merge": ("Merge", "add an adapter into its base: a dense checkpoint"),
    "quantize": ("Quantize", "write a 4-bit model, to be loaded at once"),
    "convert": ("Convert", "write a checkpoint in another format"),
    "plan": ("Plan", "what a run takes of a device, before it is rented"),
    "demo": ("Demo", "fine-tune a small model here and now, in a few minutes"),
}
FOOTER = (
    "Every option can also stand in a YAML file: --config FILE. Names are those of the options "
    "without the dashes, those with a dot nested (lora: {rank: 16}); the command line wins. What "
    "has no dashes (MODEL, SOURCE, DEST) stands on the command line."
)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command. Exits 2, with one message and no traceback, on bad input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(version("qlora-jax"))
        return
    try:
        _run(arguments[0], arguments[1:])
    except QloraError as error:
        print(f"qlora-jax: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:  # no room on the disk, no permission: the message says all
        print(f"qlora-jax: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _run(name: str, arguments: list[str]) -> None:
    if name not in COMMANDS:
        raise QloraError(f"no command {name!r}\n\n{_usage()}")
    if importlib.util.find_spec("tyro") is None:
        raise missing("tyro", "the command line", "cli")
    module = importlib.import_module(f"qlora_jax.commands.{name}")
    parse(getattr(module, COMMANDS[name][0]), arguments, name).run()


def parse(command: Any, arguments: Sequence[str], name: str) -> Any:
    """An instance of `command`, a dataclass of settings, from a command line; --config FILE in it
    is replaced by what the file says."""
    import tyro

    settings = tyro.cli(
        command,
        prog=f"qlora-jax {name}",
        description=f"{command.__doc__}\n\n{FOOTER}",
        args=_with_file(arguments),
    )
    return _at_home(settings)


def _at_home(settings: Any) -> Any:
    """The settings with `~` in paths replaced, which no shell does in `--output=~/x` or a file."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    paths = {
        name: Path(os.path.expanduser(path))
        for name, path in values.items()
        if isinstance(path, Path)
    }
    return dataclasses.replace(settings, **paths)


def _with_file(arguments: Sequence[str]) -> list[str]:
    """The arguments with `--config FILE` replaced by what the file says, before all others."""
    rest: list[str] = []
    from_file: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        flag, _, value = argument.partition("=")
        if flag != "--config":
            rest.append(argument)
            continue
        path = value or next(remaining, None)
        if path is None:
            raise QloraError("--config needs a file")
        from_file += _flags(_read_yaml(Path(os.path.expanduser(path))), "")
    return from_file + rest


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise missing("pyyaml", f"reading {path}", "cli") from error
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise QloraError(f"{path}: no such file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise QloraError(f"{path}: not YAML ({error})") from error
    if not isinstance(content, Mapping):
        raise QloraError(f"{path}: expected settings as `name: value`")
    return content


def _flags(settings: Mapping[str, Any], prefix: str) -> list[str]:
    """The settings of a file as they would stand on the command line, which then checks them."""
    flags: list[str] = []
    for key, value in settings.items():
        name = f"{prefix}{str(key).replace('_', '-')}"
        if isinstance(value, Mapping) and not name.endswith("-pattern"):
            flags += _flags(value, f"{name}.")
        elif isinstance(value, bool):
            parent, dot, last = name.rpartition(".")
            flags.append(f"--{name}" if value else f"--{parent}{dot}no-{last}")
        else:
            flags += [f"--{name}", *_words(value)]
    return flags


def _words(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [str(word) for item in value.items() for word in item]
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_entry(item) if isinstance(item, Mapping) else str(item) for item in value]
    return [str(value)]


def _entry(settings: Mapping[str, Any]) -> str:
    """{path: a.jsonl, weight: 0.5} as the command line has it: a.jsonl,weight=0.5."""
    rest = {str(key): value for key, value in settings.items()}
    if "path" not in rest:
        raise QloraError(f"an entry of a list needs a `path`; got {rest}")
    return ",".join([str(rest.pop("path")), *(f"{key}={value}" for key, value in rest.items())])


def _usage() -> str:
    lines = [f"  {name:<10} {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: qlora-jax COMMAND [OPTIONS]",
            "",
            "QLoRA fine-tuning in JAX.",
            "",
            *lines,
            "",
            "qlora-jax COMMAND --help lists the options of a command.",
            FOOTER,
        ]
    )


if __name__ == "__main__":
    main()
