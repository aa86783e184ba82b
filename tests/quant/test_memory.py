"""Quantizing a tensor takes little besides it: what a checkpoint's streaming import relies on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.quant import NF4, quantize


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_temporaries_stay_near_one_more_tensor(dtype):
    x = jax.ShapeDtypeStruct((2048, 4096), dtype)
    compiled = jax.jit(lambda x: quantize(x, NF4())).lower(x).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary <= 1.25 * x.size * np.dtype(dtype).itemsize
