"""A rank of two whose parameters are sharded: how far each direction moves them, gathered (test_directions.py)."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from adasam_hf import AdaSAM, Perturbation
from adasam_hf.directions import DIRECTIONS

NAMES = ["preconditioned", "friendly", "noise"]


def moves(name, wrap, shapes=((3, 4), (5,))):
    """By how much the parameters are moved in each of three steps."""
    torch.manual_seed(7)
    wholes = [torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).view(shape) for shape in shapes]
    params = [nn.Parameter(wrap(whole)) for whole in wholes]
    optimizer = AdaSAM(params, lr=0.1, rho=0.3)
    direction, perturbation = DIRECTIONS[name](optimizer), Perturbation(optimizer)
    seen = []
    for t in range(1, 4):
        for p in params:
            p.grad = torch.sin(p.detach() * t) / t
        before = [p.detach().clone() for p in params]
        with perturbation.perturbed(0.3, direction):
            seen += [p.detach() - w for p, w in zip(params, before, strict=True)]
            for p in params:
                p.grad = torch.cos(p.detach() * t)
        optimizer.step()
    return [d.full_tensor() if isinstance(d, DTensor) else d for d in seen]


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found = {name: moves(name, lambda t: distribute_tensor(t, mesh, [Shard(0)])) for name in NAMES}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
