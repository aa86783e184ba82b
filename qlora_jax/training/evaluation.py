"""The loss on held-out examples, now and then in a run."""

from qlora_jax import lora
from qlora_jax.checkpoints.any_model import AnyModel
from qlora_jax.data import TokenizedDataset, evaluation_batches
from qlora_jax.data.lengths import row_length
from qlora_jax.errors import QloraError
from qlora_jax.parallel import Layout
from qlora_jax.training.interrupts import Interrupts
from qlora_jax.training.settings import TrainSettings
from qlora_jax.training.step import make_eval_step


class HeldOut:
    """The evaluation set, and the compiled function that is run on it."""

    def __init__(
        self,
        model: AnyModel,
        dataset: TokenizedDataset,
        settings: TrainSettings,
        layout: Layout | None = None,
    ) -> None:
        self._params, self._dataset, self._layout = model.params, dataset, layout
        self._batch_size = settings.batch_size
        self._length = row_length(dataset, settings.sequence_length)
        parts = 1 if layout is None else layout.row_parts
        if dataset.filler is None and len(dataset) % parts:
            raise QloraError(
                f"{len(dataset)} held-out examples cannot be split over data x fsdp = {parts} "
                f"devices, and where numbers are predicted none can be added that does not count; "
                f"hold out a multiple of {parts}"
            )
        self._step = make_eval_step(model.loss)

    def evaluate(self, adapters: lora.Adapters, interrupts: Interrupts) -> tuple[float, int] | None:
        """(mean loss over all labelled tokens, their number); None if interrupted."""
        if interrupts.caught:
            return None
        total, tokens = 0.0, 0.0
        for batch in evaluation_batches(
            self._dataset, self._batch_size, sequence_length=self._length
        ):
            placed = batch if self._layout is None else self._layout.batch(batch)
            loss, count = self._step(adapters, self._params, placed)
            total, tokens = total + float(loss), tokens + float(count)
            if interrupts.caught:
                return None
        return total / max(tokens, 1.0), int(tokens)
