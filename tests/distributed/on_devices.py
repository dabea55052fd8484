"""Trainings whose processes have an accelerator each, or with ADASAM_DEVICE=cpu none:

    torchrun --standalone --nproc_per_node 2 tests/distributed/on_devices.py FOLDER

leaves FOLDER/<case>-<rank>.pt. With NCCL on CUDA GPUs, with gloo on CPUs.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate.state import AcceleratorState
from conftest import DEVICE
from distributed.cases import train
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import init_device_mesh

from adasam_hf import AdaSAM

CASES = {
    "synchronized": {},
    "microbatch": {"sam_scope": "microbatch"},
    "norm": {"sam_parameters": "norm"},
    "momentum": {"sam_direction": "momentum"},
}
STEPS = 4


def inputs(step):
    """What all processes together see in one step, the same in each of them."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)


def offloaded(device, offload=True):
    """Weights after a loop by hand whose parameters FSDP2 shards and, if asked to, keeps on the host."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(device)
    world = torch.distributed.get_world_size()
    mesh = init_device_mesh(device.type, (world,))
    policy = {"offload_policy": CPUOffloadPolicy()} if offload else {}
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh, **policy)
    return by_hand(model, device, torch.distributed.get_rank(), world)


def by_hand(model, device, rank=0, world=1):
    optimizer = AdaSAM(model.parameters(), lr=0.01, eps=1e-3, rho=0.1)

    def backward(step):
        x, y = (t.chunk(world)[rank].to(device) for t in inputs(step))
        nn.functional.mse_loss(model(x), y).backward()

    for step in range(STEPS):
        backward(step)
        with optimizer.perturbed():
            backward(step)
        optimizer.step()
        optimizer.zero_grad()
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().reshape(-1).cpu() for p in full])


def plain_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


if __name__ == "__main__":
    target, on_cpu = Path(sys.argv[1]), DEVICE.type == "cpu"
    for name, case in CASES.items():
        result = train(target, on_cpu=on_cpu, **case)
        torch.save(result, target / f"{name}-{torch.distributed.get_rank()}.pt")
        AcceleratorState._reset_state(reset_partial_state=False)
    rank = torch.distributed.get_rank()
    here = DEVICE if on_cpu else torch.device(DEVICE.type, rank)
    torch.save({"weights": offloaded(here, offload=not on_cpu)}, target / f"sharded-{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
