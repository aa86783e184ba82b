import pytest

from qlora_jax.plan.search import Largest, largest


class Trials:
    """An oracle that counts what it is asked."""

    def __init__(self, size):
        self.size, self.asked = size, []

    def __call__(self, number):
        self.asked.append(number)
        return self.size(number)


@pytest.mark.parametrize("answer", [1, 2, 3, 7, 37, 99, 100])
def test_a_line_is_searched_in_few_trials(answer):
    trial = Trials(lambda n: 1000 + 10 * n)
    found = largest(trial, 1000 + 10 * answer + 5, {1: 1010}, 100, trials=20)
    assert found == Largest(answer, None if answer == 100 else answer + 1, True)
    assert len(trial.asked) <= 9
    assert len(set(trial.asked)) == len(trial.asked)


def test_a_good_guess_takes_two_trials():
    trial = Trials(lambda n: 1000 + 10 * n)
    assert largest(trial, 1375, {1: 1010}, 4096, guess=37, trials=2) == Largest(37, 38, True)
    assert trial.asked == [37, 38]


def test_what_grows_faster_than_a_line():
    trial = Trials(lambda n: n * n)
    found = largest(trial, 1000**2 - 1, {128: 128**2}, 4096, step=128, trials=20)
    assert found == Largest(896, 1024, True)
    assert all(n % 128 == 0 for n in trial.asked)


def test_downwards_and_nothing_fits():
    trial = Trials(lambda n: 1000 + 10 * n)
    assert largest(trial, 1035, {16: 1160}, 4096, trials=20) == Largest(3, 4, True)
    assert largest(trial, 900, {16: 1160}, 4096, trials=20) == Largest(0, 1, True)


def test_a_compiler_that_says_no_number():
    trial = Trials(lambda n: 1000 + 10 * n if n <= 5 else None)
    assert largest(trial, 1050, {8: None}, 4096, trials=20) == Largest(5, 6, True)


def test_the_limit_of_what_may_be_asked_for():
    trial = Trials(lambda n: n)
    assert largest(trial, 10**9, {512: 512}, 2000, step=128, guess=10**6) == Largest(
        2000, None, True
    )
    assert trial.asked == [2000]


def test_out_of_trials():
    trial = Trials(lambda n: n)
    found = largest(trial, 1000, {1: 1}, 4096, guess=500, trials=1)
    assert found == Largest(500, None, False)
