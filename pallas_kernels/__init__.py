"""Kernels over plain arrays. Nothing here knows about `qlora_jax`."""
