"""Times of steps, taken in turns on the same batches."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..perturbation import Perturbation
from .contenders import Batch, backward, through_trainer
from .device import chosen_device, forget_peak, peak_mib, wait
from .settings import BASE, MODES, RHO


def clock() -> str:
    """What `seconds` counts: ``CPU seconds`` of this process where it computes with one thread (OMP_NUM_THREADS=1), so
    that other jobs on the machine do not count, and else ``wall seconds``."""
    return "CPU seconds" if torch.get_num_threads() == 1 and chosen_device().type == "cpu" else "wall seconds"


def seconds(function: Callable[..., object], *args: Any) -> float:
    """Of one call, by `clock`, until the device has done all that it asks for."""
    now = time.process_time if clock() == "CPU seconds" else time.perf_counter
    wait()
    start = now()
    function(*args)
    wait()
    return now() - start


def take_turns(
    steps: Mapping[str, Callable[[Batch], object]], batches: Sequence[Batch], warm_up: int = 2
) -> dict[str, list[float]]:
    """Seconds of each contender on each batch after the first `warm_up`. The order turns with the batch."""
    names, times = list(steps), {name: list[float]() for name in steps}
    for i, batch in enumerate(batches):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            spent = seconds(steps[name], batch)
            if i >= warm_up:
                times[name].append(spent)
    return times


def one_by_one(
    makers: Mapping[str, Callable[[], Callable[[Batch], object]]],
    batches: Sequence[Batch],
    enough: Callable[[], bool],
    warm_up: int = 3,
) -> Iterator[tuple[str, list[float], float | None]]:
    """Name, seconds on each batch after the first `warm_up`, and peak MiB of each contender, one after the other.

    Only one of them holds memory at a time, so that the largest models fit, and the device tells its peak. On a CPU,
    whose load changes meanwhile, `take_turns` is fairer.

    Args:
        makers: each makes its contender.
        enough: whether to stop; asked before each contender, and within one after its first time.
    """
    for name, make in makers.items():
        if enough():
            return
        forget_peak()
        step, spent = make(), list[float]()
        for i, batch in enumerate(batches):
            taken = seconds(step, batch)
            if i >= warm_up:
                spent.append(taken)
            if spent and enough():
                break
        yield name, spent, peak_mib()
        del step


def ratios(times: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median and quartiles of the ratio to BASE on the same batch."""
    out = {}
    for name, spent in times.items():
        paired = [a / b for a, b in zip(spent, times[BASE], strict=True)]
        low, middle, high = statistics.quantiles(paired, n=4) if len(paired) > 1 else paired * 3  # no spread
        out[name] = {"ratio": middle, "low": low, "high": high}
    return out


MOVE = "norm, copy and move"


def phases(model: nn.Module, dtype: str, batches: Sequence[Batch]) -> dict[str, float]:
    """Median seconds of a full AdaSAM step and of its parts, and of one update of AdamW (fused).

    The passes and the two moves are done once more by themselves, with the trainer's own `Perturbation`; so the parts
    need not add up to the step.
    """
    base, adasam = (through_trainer(model, dtype, MODES[name]) for name in (BASE, "AdaSAM"))
    perturbation = Perturbation(torch.optim.SGD(model.parameters()))
    rows = []
    for batch in batches:
        passes, update = seconds(adasam.passes, batch), seconds(adasam.update)
        now = {"step": passes + update, "update": update}
        now["ascent"] = seconds(backward, model, batch, dtype)
        now[MOVE] = seconds(perturbation.ascend, RHO)
        now["descent"] = seconds(backward, model, batch, dtype)
        now["restore"] = seconds(perturbation.restore)
        model.zero_grad()
        base.passes(batch)
        now["AdamW update"] = seconds(base.update)
        rows.append(now)
    middle = {name: statistics.median(row[name] for row in rows[1:]) for name in rows[0]}
    middle["outside the passes"] = middle[MOVE] + middle["restore"] + middle["update"]
    middle["outside the passes / AdamW update"] = middle["outside the passes"] / middle["AdamW update"]
    return middle
