"""The one exception type a person sees when their input, not this library, is at fault."""


class QloraError(ValueError):
    """Bad input: the message says what was wrong, where, and what to do."""


def missing(package: str, purpose: str, extra: str) -> QloraError:
    """The error for an optional package that is not installed."""
    return QloraError(f"{purpose} needs the package {package}: pip install 'qlora-jax[{extra}]'")


def reason(error: BaseException) -> str:
    """The first line of another package's error, for a message of ours: theirs may run to pages."""
    lines = str(error).strip().splitlines()
    name = type(error).__name__
    if not lines:
        return name
    return lines[0] if isinstance(error, QloraError) else f"{name}: {lines[0]}"
