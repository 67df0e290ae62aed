"""What the processes of the distributed tests run: they are spawned, and import this file and little else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import normfree

WORLD = 2
STEPS = 2
Result = tuple[dict[str, Tensor], dict[str, Tensor], Any]
"""Gradients of the last step, the trained state, and what else is of interest."""


class Residual(nn.Module):
    """Five channels: no number of processes but one and five shards them evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.pre = nn.BatchNorm2d(5)
        self.conv1, self.bn1 = nn.Conv2d(5, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(torch.relu(self.pre(x))))
        return x + self.bn2(self.conv2(torch.relu(y)))


def build(init: str) -> nn.Module:
    """Return the same converted model in every process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), Residual(), Residual()).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return normfree.convert(model, init=init, alpha=0.7)


def batches() -> Tensor:
    """Return one batch for every step: ``(STEPS, N, 3, H, W)``."""
    return torch.randn(STEPS, 2 * WORLD, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, steps: Tensor) -> dict[str, Tensor]:
    """Take a step a batch, with two forward passes before each backward; return the gradients of the last one."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for x in steps:
        optimizer.zero_grad()
        (model(x).square().mean() + model(-x).sin().mean()).backward()
        optimizer.step()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def run(rank: int, folder: Path) -> None:
    """Join the others through a file, train in every way, and write down what this process then has."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=WORLD)
    mine = batches().chunk(WORLD, dim=1)[rank]
    for init in ("skipinit", "preserve"):
        torch.save(data_parallel(build(init), mine), folder / f"data_parallel-{init}-{rank}")
        torch.save(sharded(build(init), mine), folder / f"sharded-{init}-{rank}")
    dist.destroy_process_group()


def data_parallel(model: nn.Module, mine: Tensor) -> Result:
    """Train under DDP; return also what is broadcast in every forward pass."""
    wrapped = DistributedDataParallel(model)
    gradients = {name.removeprefix("module."): gradient for name, gradient in train(wrapped, mine).items()}
    return gradients, dict(model.state_dict()), wrapped.modules_buffers


def sharded(model: nn.Module, mine: Tensor) -> Result:
    """Train under FSDP2, every block sharded by itself; return what is gathered, and the shapes of the shards."""
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in (model[0], model[3], model[4]):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    local = {name: tuple(parameter.to_local().shape) for name, parameter in model.named_parameters()}
    gradients = {name: gradient.full_tensor() for name, gradient in train(model, mine).items()}
    return (
        gradients,
        {
            name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            for name, tensor in model.state_dict().items()
        },
        local,
    )
