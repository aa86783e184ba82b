"""QLoRA in JAX."""
