"""AdaSAM inside a ZeroRedundancyOptimizer, against AdaSAM beside DistributedDataParallel. python zero.py RANK FOLDER"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from adasam_hf import AdaSAM, Perturbation


def model():
    torch.manual_seed(0)
    return DistributedDataParallel(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double())


def train(rank, make, rho, steps=3):
    net = model()
    optimizer = make(net.parameters())
    perturbation = Perturbation(optimizer)
    torch.manual_seed(1)
    x, y = torch.randn(steps, 8, 4, dtype=torch.float64), torch.randint(0, 3, (steps, 8))
    for t in range(steps):
        batch, labels = x[t, rank::2], y[t, rank::2]
        nn.functional.cross_entropy(net(batch), labels).backward()
        with perturbation.perturbed(rho):
            nn.functional.cross_entropy(net(batch), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


def refused(call):
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return "not refused"


def main(rank, folder):
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    kwargs = {"lr": 0.05, "rho": 0.5}

    def zero(params):
        return ZeroRedundancyOptimizer(params, AdaSAM, **kwargs)

    found = {
        "plain": train(rank, lambda params: AdaSAM(params, **kwargs), 0.5),
        "zero": train(rank, zero, 0.5),
        "radius 0": train(rank, zero, 0.0),
    }
    net = model()
    optimizer = zero(net.parameters())

    def closure():
        optimizer.zero_grad()
        net(torch.ones(2, 4, dtype=torch.float64)).sum().backward()

    closure()
    found["refused"] = [
        refused(lambda: optimizer.step(closure)),
        refused(optimizer.optim.perturbed),
        refused(optimizer.optim.ascend),
    ]
    found["parameters"] = sum(len(group["params"]) for group in optimizer.optim.param_groups)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
