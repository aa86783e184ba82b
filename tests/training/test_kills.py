"""A few runs killed at random moments; `python -m benchmarks.interruptions` does it to fifty."""

import random

import pytest

from benchmarks import interruptions


@pytest.mark.slow
def test_killed_runs_end_as_if_they_had_not_been(tmp_path):
    rng, cache = random.Random(0), tmp_path / "compiled"
    interruptions.prepare()
    interruptions.to_the_end(tmp_path / "whole", cache, fill=True)
    moments = []
    for number in range(3):
        output = tmp_path / str(number)
        output.mkdir()
        moments.append(interruptions.kill(output, cache, rng))
        interruptions.to_the_end(output, cache)
        assert interruptions.result(output) == interruptions.result(tmp_path / "whole")
    assert None not in moments, "a run had ended before it was killed"
