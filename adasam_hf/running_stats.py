"""Running statistics of BatchNorm and its relatives, which a second forward pass would move a second time."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Leave ``running_mean``, ``running_var`` and ``num_batches_tracked`` of `model` as they are now.

    The block may run forward passes in training mode; they normalize by their own batch as ever. In an ascent and
    descent, the statistics then move once per step, at the unperturbed weights:

        loss_fn(model(x), y).backward()
        with optimizer.perturbed(), running_stats.kept(model):
            loss_fn(model(x), y).backward()
    """
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    live = [b for m in norms for b in m.buffers(recurse=False)]
    saved = [b.clone() for b in live]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(live, saved, strict=True):
                buffer.copy_(value)
