"""The one exception type a person sees when their input, not this library, is at fault."""


class QloraError(ValueError):
    """Bad input: the message says what was wrong, where, and what to do."""
