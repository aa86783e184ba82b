"""The batches of a run, step by step."""

from collections.abc import Iterator

import jax

from qlora_jax.data import Batch, TokenizedDataset, batches
from qlora_jax.errors import QloraError
from qlora_jax.training.settings import TrainSettings


class StepBatches:
    """What each step of a run trains on: a pure function of the data, the settings and the step.

    steps: how many the run takes.
    """

    def __init__(self, train: TokenizedDataset, settings: TrainSettings) -> None:
        self._train, self._settings = train, settings
        self._length = sequence_length(train, settings.sequence_length)
        self.steps = settings.steps_for(len(train))

    def start(self, step: int = 0) -> Iterator[Batch]:
        """Batches from `step` on, counted from 0, to the end of the run.

        Leaves are [B, T] or, accumulating, [accumulate, B, T]. Step n gives the same batch wherever
        the iteration started, so that resuming needs nothing but the step.
        """
        settings = self._settings
        stream = batches(
            self._train,
            settings.batch_size * settings.accumulate,
            seed=settings.seed,
            sequence_length=self._length,
            start_step=step,
        )
        for _, batch in zip(range(step, self.steps), stream, strict=False):
            if settings.accumulate == 1:
                yield batch
            else:
                shape = (settings.accumulate, settings.batch_size, -1)
                yield jax.tree.map(lambda x, shape=shape: x.reshape(shape), batch)


def sequence_length(dataset: TokenizedDataset, wanted: int | None = None) -> int:
    """T of every batch: `wanted`, or the longest example's length rounded up to whole lanes.

    It is not rounded beyond the dataset's max_length. Raises QloraError for an empty dataset, and
    if an example is longer than `wanted`.
    """
    if not len(dataset):
        raise QloraError("the dataset has no examples")
    longest = max(map(len, dataset))
    if wanted is None:
        rounded = -(-longest // 32) * 32
        return rounded if dataset.max_length is None else min(rounded, dataset.max_length)
    if longest > wanted:
        raise QloraError(
            f"sequence_length is {wanted}, but there is an example of {longest} tokens; "
            f"tokenize with max_length={wanted}"
        )
    return wanted
