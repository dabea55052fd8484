"""On what device the benchmarks run, and what is measured there."""

import gc
import os

import torch

REHEARSAL = os.environ.get("ADASAM_DEVICE") == "cpu"
"""Whether an accelerator is forbidden; everything then runs on the CPU."""


def chosen_device() -> torch.device:
    """The current accelerator; the CPU where there is none, or where ADASAM_DEVICE=cpu."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if REHEARSAL or accelerator is None else accelerator


def wait() -> None:
    """For all that the host has given the device to do."""
    if chosen_device().type != "cpu":
        torch.accelerator.synchronize()


def forget_peak() -> None:
    """Free what nobody needs, and count the peak of memory from here on."""
    gc.collect()
    if chosen_device().type != "cpu":
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats()


def peak_mib() -> float | None:
    """MiB of tensors that the accelerator has held at most since `forget_peak`; None for a CPU, which cannot tell."""
    return None if chosen_device().type == "cpu" else torch.accelerator.max_memory_allocated() / 2**20
