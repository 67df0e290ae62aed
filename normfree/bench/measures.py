"""Single figures of one arm: what a step computes, how long it takes, and what it keeps."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from normfree.tracing.inputs import tensors

__all__ = ["Step", "kernels", "largest_batch", "operators", "peak_memory", "saved_bytes", "seconds"]


@dataclass(frozen=True)
class Step:
    """One training step: forward, backward, SGD.

    Attributes:
        model: The model, compiled or not, in the mode it trains in.
        optimizer: Its optimizer.
        dtype: What autocast computes in; ``torch.float32`` runs without it.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    dtype: torch.dtype = torch.float32

    def __call__(self, x: Tensor) -> None:
        """Take one step on a batch ``(N, C, *)``."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(x).backward()  # type: ignore[no-untyped-call]  # torch's own stub
        self.optimizer.step()

    def loss(self, x: Tensor) -> Tensor:
        """Return a scalar that every output of any model takes part in: the sum of their mean squares."""
        with autocast(x.device, self.dtype):
            outputs = self.model(x)
        return torch.stack([y.float().square().mean() for y in tensors(outputs) if y.is_floating_point()]).sum()


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return torch's autocast, which is off for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the wall time of one call, everything on the device included."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def saved_bytes(model: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """Return how many bytes a forward pass saves for backward: ``(an image, whatever the batch)``.

    Counted are the storages that autograd keeps, each once, without the parameters and buffers themselves. The input
    ``(N, C, *)`` is run as it is and twice as large; the batch must be at least 2, or a BatchNorm may refuse it.
    """
    once, twice = _saved(model, x, dtype), _saved(model, torch.cat([x, x]), dtype)
    image = (twice - once) // x.shape[0]
    return image, once - image * x.shape[0]


def _saved(model: nn.Module, x: Tensor, dtype: torch.dtype) -> int:
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        # Kept alive until the graph goes, so that no address is used twice; without its history, or an output that is
        # saved by its own node would keep the graph alive for ever.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(x.device, dtype):
        outputs = model(x.clone())
    del outputs
    return sum(kept.values())


class _Shapes(TorchDispatchMode):
    """Records every operator with the shapes of what goes in and comes out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.seen: list[tuple[str, tuple[torch.Size, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.seen.append((func._schema.name, tuple(t.shape for t in tensors((args, kwargs, result)))))
        return result


def operators(step: Step, x: Tensor) -> tuple[int, int]:
    """Count the operators of one forward and backward pass, views aside: ``(all, those that touch an activation)``.

    An operator touches an activation if some shape it sees depends on the batch: so two passes with different batches
    are compared. What combines gain and alpha with a weight does not, and costs nothing per image; at small batches
    some of it is done on activations instead.
    """
    runs = []
    for batch in (x, torch.cat([x, x])):
        step.optimizer.zero_grad(set_to_none=True)
        with _Shapes() as shapes:
            step.loss(batch).backward()  # type: ignore[no-untyped-call]  # torch's own stub
        runs.append(shapes.seen)
    step.optimizer.zero_grad(set_to_none=True)
    once, twice = Counter(runs[0]), Counter(runs[1])
    return len(runs[0]), (once - twice).total()


def kernels(step: Step, x: Tensor) -> int:
    """Return how many kernels one training step launches on a CUDA device."""
    from torch.profiler import ProfilerActivity, profile

    step(x)
    # acc_events: without, torch warns that events of earlier cycles are lost; there are none.
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], acc_events=True) as profiled:
        step(x)
        torch.cuda.synchronize(x.device)
    events = [event.name for event in profiled.events() or () if "CUDA" in str(event.device_type)]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in events)


def peak_memory(step: Step, x: Tensor) -> int:
    """Return the most bytes that a CUDA device holds during a training step."""
    step(x)
    torch.cuda.reset_peak_memory_stats(x.device)
    step(x)
    return torch.cuda.max_memory_allocated(x.device)


def largest_batch(step: Callable[[Tensor], None], x: Tensor, limit: int = 1 << 16) -> int:
    """Return the largest power of two that a training step takes as its batch before memory runs out.

    Args:
        step: The training step.
        x: One image or more, ``(N, C, *)``.
        limit: Where to stop looking.
    """
    largest, batch = 0, 2
    while batch <= limit:
        try:
            step(x[:1].expand(batch, *x.shape[1:]).contiguous())
        except torch.OutOfMemoryError:
            break
        finally:
            if x.device.type == "cuda":
                torch.cuda.empty_cache()
        largest, batch = batch, 2 * batch
    return largest
