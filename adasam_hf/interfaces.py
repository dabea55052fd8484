"""What the pieces of the step read of a Trainer."""

from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerState

from .training_args import SharpnessAwareArgumentsMixin


class SharpnessAwareTrainer(Protocol):
    """A Trainer that has its optimizer, with the arguments of this package."""

    args: SharpnessAwareArgumentsMixin
    model: nn.Module
    optimizer: Optimizer
    accelerator: Accelerator
    state: TrainerState
    data_collator: Any
    compute_loss_func: Any
    is_in_train: bool
    is_model_parallel: bool

    def is_world_process_zero(self) -> bool: ...

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None: ...
