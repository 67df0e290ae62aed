"""What the processes run that train networks people use together: in float64, each with its part of one batch."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import normfree

SIZE = WORLD = 4
Gradients = dict[str, Tensor]


def build(name: str) -> nn.Module:
    """Return the same converted network in every process, with alphas away from zero."""
    return copy.deepcopy(_build(name))


@functools.cache
def _build(name: str) -> nn.Module:
    torch.manual_seed(0)
    original = timm.create_model(name, num_classes=3)
    for norm in original.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.uniform_(norm.weight, 0.5, 1.0)
    return normfree.convert(original.double().train(), init="preserve", alpha=0.5)


def batch() -> tuple[Tensor, Tensor]:
    """Return the whole batch."""
    x = torch.randn(SIZE, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(SIZE) % 3


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> Gradients:
    """Return the gradients of the mean loss."""
    F.cross_entropy(model(x), y).backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def step(model: nn.Module, x: Tensor, y: Tensor) -> Gradients:
    """Take one step, and return its gradients."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    found = gradients(model, x, y)
    optimizer.step()
    optimizer.zero_grad()
    return found


def worst(found: Gradients, expected: Gradients) -> float:
    """Return the largest difference, relative to the largest entry of its own tensor."""
    if found.keys() != expected.keys() or not all(bool(tensor.any()) for tensor in expected.values()):
        return float("inf")
    return max(float((found[name] - t).abs().max() / t.abs().max()) for name, t in expected.items())


def run(rank: int, folder: Path) -> None:
    """Join the others, train in every way, and write down how far this process is from one that trains alone."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=WORLD)
    two = dist.new_group([0, 1])
    found: dict[str, Any] = {
        "efficientnet_b0": data_parallel("efficientnet_b0"),
        "sharded": sharded(folder / "full.pt"),
    }
    if rank < 2:
        found["resnet50"] = data_parallel("resnet50", two)
    torch.save(found, folder / str(rank))
    dist.barrier()
    dist.destroy_process_group()


def mine(group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Return this process's part of the batch."""
    return [part.chunk(dist.get_world_size(group))[dist.get_rank(group)] for part in batch()]


def data_parallel(name: str, group: dist.ProcessGroup | None = None) -> tuple[float, int]:
    """Return the error of the gradients under DDP, and how many buffers it broadcasts."""
    model = build(name)
    expected = gradients(model, *batch())
    model.zero_grad()
    wrapped = DistributedDataParallel(model, process_group=group, gradient_as_bucket_view=True)
    return worst(gradients(wrapped, *mine(group)), expected), len(wrapped.modules_buffers)


def shard(model: nn.Module) -> nn.Module:
    """Shard every stage by itself, and the rest."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for stage in model.blocks:
        fully_shard(stage, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharded(file: Path) -> tuple[float, float]:
    """Train, save a full state, load it into another sharded model, train on; return the errors of both steps."""
    alone, model = build("efficientnet_b0"), shard(build("efficientnet_b0"))
    first = worst(full(step(model, *mine())), step(alone, *batch()))
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=whole)
    if dist.get_rank() == 0:
        torch.save(state, file)
    other = build("efficientnet_b0")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    shard(other)
    loaded = torch.load(file) if dist.get_rank() == 0 else {}
    set_model_state_dict(other, loaded, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return first, worst(full(step(other, *mine())), step(alone, *batch()))


def full(gradients: Gradients) -> Gradients:
    """Gather what is sharded."""
    return {name: gradient.full_tensor() for name, gradient in gradients.items()}
