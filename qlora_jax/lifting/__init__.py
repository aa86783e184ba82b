"""The rules of `qlora_jax.lift`: how a weight that is never made dense flows through a jaxpr."""
