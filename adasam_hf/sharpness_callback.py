"""A callback that logs how sharp a model's loss is while it trains."""

from collections.abc import Sequence, Sized
from typing import Any

from torch import nn
from torch.utils.data import Subset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from . import rng
from .sharpness_measures import refuse_fused_attention, sam_gap, top_eigenvalues


class SharpnessCallback(TrainerCallback):
    """Logs how sharp the model's loss on training rows is, at each evaluation, to wherever the trainer logs
    (TensorBoard and all other trackers of Transformers):

        trainer.add_callback(SharpnessCallback(trainer, radii=(0.01, 0.05)))

    Logged: ``sharpness/gap_<radius>`` for each radius (`sam_gap`) and, if asked for, ``sharpness/eigenvalue``. The
    rows are the first ones of the training set, always the same; the model is in eval mode and in the precision that
    it is trained in. Neither weights, gradients nor random numbers of the training change, bit for bit.

    Args:
        trainer: a Transformers `Trainer` with a training set of known length, whose model is called as
            ``model(**batch)`` and has ``.loss``; it is that loss that is measured, whatever `compute_loss` makes of it.
            With several processes: the rows of process 0.
        radii: each > 0.
        batches: how many of the trainer's evaluation batch size. Cost of each at every evaluation: see `sam_gap` and
            `top_eigenvalues`.
        eigenvalue: whether to measure the Hessian's largest eigenvalue, too.

    Raises:
        ValueError: for bad values, and before training without a training set of known length or where there is no
            second derivative for the eigenvalue.
    """

    def __init__(
        self, trainer: Trainer, radii: Sequence[float] = (0.05,), batches: int = 4, eigenvalue: bool = False
    ) -> None:
        if not radii or not all(rho > 0 for rho in radii) or batches < 1:
            raise ValueError(f"radii={radii!r} must be some numbers > 0, and batches={batches!r} at least 1")
        self.trainer, self.radii, self.count, self.eigenvalue = trainer, tuple(radii), batches, eigenvalue
        self._measured: int | None = None  # the step of the last measurement

    def on_train_begin(  # type: ignore[override]
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Refuse what could not be measured at the first evaluation."""
        if not isinstance(self.trainer.train_dataset, Sized):
            raise ValueError("SharpnessCallback measures training rows; give the trainer a train_dataset with a length")
        if self.eigenvalue:
            refuse_fused_attention(model)
        self._measured = None

    def on_evaluate(  # type: ignore[override]  # Transformers passes the model by its name
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Measure and log, once for each step (with several evaluation sets there are as many evaluations)."""
        if self._measured == state.global_step:
            return
        self._measured = state.global_step
        gradients = {p: p.grad for p in model.parameters()}
        with rng.replay(rng.capture()):  # even to begin a loader draws a number
            # in order, and never cached; a trainer that trains has a training set
            loader = self.trainer.get_test_dataloader(self._first_rows())
            batches = [self.trainer._prepare_inputs(batch) for batch in loader]  # to its end: Accelerate counts on that
            gaps = sam_gap(model, batches, self.radii)
            values = {f"sharpness/gap_{rho:g}": gap for rho, gap in zip(self.radii, gaps, strict=True)}
            if self.eigenvalue:
                (values["sharpness/eigenvalue"],) = top_eigenvalues(model, batches)
        for p, gradient in gradients.items():
            p.grad = gradient
        self.trainer.log(values)

    def _first_rows(self) -> Any:
        rows: Any = self.trainer.train_dataset
        # With several processes a loader deals its batches out in turn.
        args = self.trainer.args
        count = min(len(rows), self.count * args.eval_batch_size * args.world_size)
        return rows.select(range(count)) if hasattr(rows, "select") else Subset(rows, range(count))
