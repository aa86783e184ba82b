"""The commands of `qlora-jax`, one module each: a dataclass of settings with a `run` method."""
