"""The code books against the printed constants and against bitsandbytes' table."""

import numpy as np
import pytest

from qlora_jax.quant import codebooks
from tests.quant import oracle


def test_nf4_from_its_definition_hits_every_bit():
    assert codebooks.nf4().tobytes() == oracle.NF4.tobytes()


def test_fp4_has_the_sign_in_its_highest_bit():
    assert codebooks.fp4().tobytes() == oracle.LEVELS["fp4"].tobytes()


def test_dynamic_map_is_the_table_that_checkpoints_carry(golden):
    table = codebooks.dynamic_8bit()
    assert table.tobytes() == golden["dynamic_map"].tobytes()
    assert np.unique(table).size == 256
    assert table[127] == 0.0
    assert table[0] == np.float32(-0.99296874)
    np.testing.assert_allclose(table, oracle.dynamic_map(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("codebook", ["nf4", "fp4"])
def test_midpoints(codebook):
    levels = oracle.LEVELS[codebook][oracle.ORDER[codebook]]
    assert codebooks.midpoints(levels).tobytes() == oracle.thresholds(codebook).tobytes()


def test_tables_cannot_be_changed_by_a_caller():
    with pytest.raises(ValueError, match="read-only"):
        codebooks.nf4()[0] = 0.0
