"""A callback that logs how sharp a model's loss is while it trains."""

from collections.abc import Sequence, Sized
from typing import Any

from torch import nn
from torch.utils.data import Subset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from . import rng
from .sharpness_measures import refuse_fused_attention, sam_gap, top_eigenvalues


class SharpnessCallback(TrainerCallback):
    """Logs, at each evaluation, how sharp the model's loss on training rows is, to wherever the trainer logs
    (TensorBoard and all other trackers of Transformers):

        trainer.add_callback(SharpnessCallback(trainer, radii=(0.01, 0.05)))

    It logs ``sharpness/gap_<radius>`` for each radius (`sam_gap`) and, if asked to, ``sharpness/eigenvalue``. The rows
    are always the first ones of the training set; the model is in eval mode, in the precision that it trains in.
    Weights, gradients and random numbers of the training stay the same, bit for bit.

    Args:
        trainer: a Transformers `Trainer` with a training set of known length, whose model is called as
            ``model(**batch)`` and returns ``.loss``. That loss is measured, even if `compute_loss` changes it. With
            several processes, the rows are those of process 0.
        radii: radii to measure the gap at, each > 0.
        batches: number of batches, of the trainer's evaluation batch size. `sam_gap` and `top_eigenvalues` say what
            each costs, at every evaluation.
        eigenvalue: whether to measure the Hessian's largest eigenvalue, too.

    Raises:
        ValueError: for bad values; when training starts, for a training set without a length, or if the eigenvalue
            is asked for and the attention has no second derivative.
    """

    def __init__(
        self, trainer: Trainer, radii: Sequence[float] = (0.05,), batches: int = 4, eigenvalue: bool = False
    ) -> None:
        if not radii or not all(rho > 0 for rho in radii) or batches < 1:
            raise ValueError(f"radii={radii!r} must be one or more numbers > 0, and batches={batches!r} at least 1")
        self.trainer, self.radii, self.count, self.eigenvalue = trainer, tuple(radii), batches, eigenvalue
        self._measured: int | None = None  # the step of the last measurement

    def on_train_begin(  # type: ignore[override]
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Refuse what the first evaluation could not measure."""
        if not isinstance(self.trainer.train_dataset, Sized):
            raise ValueError("SharpnessCallback measures training rows; give the trainer a train_dataset with a length")
        if self.eigenvalue:
            refuse_fused_attention(model)
        self._measured = None

    def on_evaluate(  # type: ignore[override]  # Transformers passes the model by its name
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Measure and log, once for each step, even if there are several evaluation sets."""
        if self._measured == state.global_step:
            return
        self._measured = state.global_step
        gradients = {p: p.grad for p in model.parameters()}
        with rng.replay(rng.capture()):  # even starting a loader draws a random number
            # the test loader reads rows in order, and is never cached
            loader = self.trainer.get_test_dataloader(self._first_rows())
            batches = [
                self.trainer._prepare_inputs(batch) for batch in loader
            ]  # all of them: Accelerate relies on a loader being exhausted
            gaps = sam_gap(model, batches, self.radii)
            values = {f"sharpness/gap_{rho:g}": gap for rho, gap in zip(self.radii, gaps, strict=True)}
            if self.eigenvalue:
                (values["sharpness/eigenvalue"],) = top_eigenvalues(model, batches)
        for p, gradient in gradients.items():
            p.grad = gradient
        self.trainer.log(values)

    def _first_rows(self) -> Any:
        rows: Any = self.trainer.train_dataset
        # With several processes, a loader deals its batches out in turn.
        args = self.trainer.args
        count = min(len(rows), self.count * args.eval_batch_size * args.world_size)
        return rows.select(range(count)) if hasattr(rows, "select") else Subset(rows, range(count))
