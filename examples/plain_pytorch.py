#!/usr/bin/env python
"""AdaSAM in a plain PyTorch loop, without Transformers: a small network on two spirals.

python examples/plain_pytorch.py --rho 0.05
"""

import argparse
import math

import torch
from torch import nn

from adasam_hf import AdaSAM, rng


def spirals(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of two interleaved spirals, and which of them each lies on."""
    turn = torch.rand(count).sqrt() * 2 * math.pi
    label = torch.arange(count) % 2
    angle = turn + math.pi * label
    points = torch.stack([turn * angle.cos(), turn * angle.sin()], dim=1) / 4
    return points + 0.05 * torch.randn(count, 2), label


def main() -> nn.Module:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rho", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=600)
    args = parser.parse_args()

    torch.manual_seed(0)
    train, labels = spirals(400)
    test, answers = spirals(400)
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    loss_fn = nn.CrossEntropyLoss()
    optimizer = AdaSAM(model.parameters(), lr=3e-3, rho=args.rho)
    for _ in range(args.steps):
        rows = torch.randint(len(train), (64,))
        masks = rng.capture()  # so that dropout is the same in both passes
        loss_fn(model(train[rows]), labels[rows]).backward()
        with optimizer.perturbed(), rng.replay(masks):
            loss_fn(model(train[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        accuracy = (model(test).argmax(dim=1) == answers).float().mean().item()
    print(f"accuracy on new points: {accuracy:.3f}")
    return model


if __name__ == "__main__":
    main()
