"""Which examples go into which batch: packing, length grouping, buckets, mixing."""

import itertools

import numpy as np
import pytest

import qlora_jax as qj
from qlora_jax.data import IGNORE, BatchSource, TokenizedDataset, TokenizedExample, mix
from qlora_jax.data.lengths import choose_buckets, group_by_length
from qlora_jax.data.order import epoch_order, shares
from qlora_jax.data.packing import WINDOW, pack


def numbered(lengths, first=0) -> TokenizedDataset:
    """Examples of these lengths; every token of example n is n."""
    rows = [np.full(size, first + n, np.int32) for n, size in enumerate(lengths)]
    return TokenizedDataset(tuple(TokenizedExample(row, row) for row in rows), pad_id=-1)


def random_lengths(count, low=3, high=60, seed=0):
    return np.random.default_rng(seed).integers(low, high, count)


def names(batch) -> list[int]:
    """The examples of a batch, each as often as it is in it."""
    found = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        found += [int(name) for name, _ in itertools.groupby(ids[mask > 0])]
    return found


@pytest.mark.parametrize("how", [{}, {"packing": True}, {"group_by_length": True, "buckets": 3}])
def test_an_epoch_has_each_example_once_and_steps_are_a_pure_function(how):
    lengths = random_lengths(50)
    make = lambda: BatchSource(numbered(lengths), 4, seed=3, sequence_length=64, **how)  # noqa: E731
    source, rows = make(), make().rows
    seen = []
    for step in range(40):
        batch = source[step]
        assert batch["input_ids"].shape in [(4, bucket) for bucket in source.buckets]
        seen += names(batch)
    epochs = [seen[start : start + 50] for start in (0, 50)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(50))] * 2 and epochs[0] != epochs[1]
    # Begun anywhere, in any order.
    other = make()
    for step in (33, 5, 17):
        for name, array in other[step].items():
            np.testing.assert_array_equal(array, source[step][name])
    per_epoch = 50
    if "packing" in how:
        per_epoch = len(pack(epoch_order(((50, 1.0),), 3, 0), lengths, 64)[1]) - 1
    assert rows.count(1) == per_epoch and rows.count(1.5) > 1.4 * per_epoch
    another = BatchSource(numbered(lengths), 4, seed=4, sequence_length=64, **how)
    assert names(another[0]) != names(source[0])


def test_packed_rows_are_nearly_full():
    lengths = random_lengths(2 * WINDOW + 100, 20, 400)
    order = np.random.default_rng(1).permutation(len(lengths))
    packed, bounds = pack(order, lengths, 512)
    assert sorted(packed) == list(range(len(lengths)))
    filled = np.add.reduceat(lengths[packed], bounds[:-1])
    assert filled.max() <= 512 and filled.mean() > 0.985 * 512


def test_packed_rows_tell_documents_apart():
    dataset = numbered([5, 3, 6])
    batch = BatchSource(dataset, 1, seed=0, sequence_length=10, packing=True)[0]
    (ids,), (segments,), (labels,) = (batch[k] for k in ("input_ids", "segment_ids", "labels"))
    real = batch["attention_mask"][0] > 0
    starts = np.flatnonzero(np.diff(segments, prepend=0) > 0)
    assert (segments > 0).tolist() == real.tolist()
    assert segments.max() == len(starts) == len(set(ids[real]))
    # Nothing is predicted from another document's last token, nor is padding.
    assert (labels[starts] == IGNORE).all() and (labels[~real] == IGNORE).all()
    inside = np.setdiff1d(np.flatnonzero(real), starts)
    assert (labels[inside] == ids[inside]).all()


def test_buckets_have_the_least_padding():
    rng = np.random.default_rng(0)
    needs = np.concatenate([rng.integers(40, 100, 60), rng.integers(150, 500, 30), [505]])

    def padded(buckets):
        return sum(min(b for b in buckets if b >= need) for need in needs)

    multiples = range(16, 512, 16)
    for count in (1, 2, 3):
        found = choose_buckets(needs.tolist(), 510, count)
        assert found[-1] == 510 and len(found) == count  # not beyond the limit of tokenizing
        several = itertools.combinations(multiples, count - 1)
        assert padded(found) == min(padded((*some, 510)) for some in several)
    assert choose_buckets([64, 60], 64, 3) == (64,)


def test_length_groups_save_padding():
    lengths = random_lengths(1000, 10, 500)
    order = np.random.default_rng(0).permutation(1000)
    grouped = group_by_length(order, lengths, 8, 3, np.random.default_rng(0))
    assert sorted(grouped) == list(range(1000))
    assert (grouped[:3] == order[:3]).all() and (grouped[-5:] == order[-5:]).all()

    def padded(order):
        return sum(8 * lengths[batch].max() for batch in order[3:-5].reshape(-1, 8))

    assert padded(order) > 1.6 * lengths.sum() and padded(grouped) < 1.05 * lengths.sum()
    # Neither the first batches nor the last are all of long examples.
    means = lengths[grouped[3:-5]].reshape(4, -1).mean(axis=1)
    assert means.max() < 1.2 * means.min()

    plain, small = (
        BatchSource(numbered(lengths), 8, seed=0, group_by_length=g, buckets=b)
        for g, b in ((False, 1), (True, 3))
    )
    sizes = [sum(source[i]["input_ids"].size for i in range(125)) for source in (plain, small)]
    assert len(small.buckets) == 3 and sizes[1] < 0.7 * sizes[0]


def test_a_mixture_keeps_its_weights():
    dataset = mix([numbered([4] * 90), numbered([4] * 10, first=90)], [0.6, 0.4])
    source = BatchSource(dataset, 10, seed=0)
    epochs = [sum((names(source[s]) for s in range(10 * e, 10 * e + 10)), []) for e in range(3)]
    for epoch in epochs:
        assert len(epoch) == 100 and sum(name >= 90 for name in epoch) == 40
        small = [name for name in epoch if name >= 90]
        assert sorted(small) == sorted(list(range(90, 100)) * 4)
    # The large one goes on where it stopped: 180 draws are two passes over 90.
    large = [name for epoch in epochs for name in epoch if name < 90]
    assert sorted(large) == sorted(list(range(90)) * 2)
    assert names(BatchSource(dataset, 10, seed=0)[27]) == names(source[27])
    assert epochs[0] != epochs[1]


def test_mixtures_that_make_no_sense():
    assert shares(((10, 1.0), (10, 2.0), (11, 3.0))) == [5, 10, 16]
    data = [numbered([4] * 5), numbered([4] * 5)]
    with pytest.raises(qj.QloraError, match="must be positive"):
        mix(data, [1.0, 0.0])
    with pytest.raises(qj.QloraError, match="without any of an epoch's 10 examples"):
        mix(data, [1.0, 1e-6])
    with pytest.raises(qj.QloraError, match="a weight for each dataset"):
        mix(data, [1.0])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"packing": True, "group_by_length": True}, "packed rows are all full"),
        ({"buckets": 4}, "buckets must be 1 to 3"),
        ({"sequence_length": 4}, "there is an example of 5 tokens"),
    ],
)
def test_arguments_that_make_no_sense(how, message):
    with pytest.raises(qj.QloraError, match=message):
        BatchSource(numbered([5, 3]), 2, seed=0, **how)
