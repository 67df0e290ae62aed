"""The gradients of one batch: computed at once, or, on a GPU, recorded and replayed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def gradients(model: nn.Module, x: Tensor, y: Tensor, bf16: bool = False) -> Tensor:
    """Put the gradients of a batch in the place of the last one's, and return its loss."""
    model.zero_grad()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach()


def recorded(model: nn.Module, x: Tensor, y: Tensor, bf16: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """Return `gradients` of batches like this one as a CUDA graph: Python would launch many small layers too slowly."""
    x, y, kept = x.clone(), y.clone(), [buffer.clone() for buffer in model.buffers()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries set themselves up in a first pass, which cannot be recorded
        gradients(model, x, y, bf16)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = gradients(model, x, y, bf16)
    for buffer, before in zip(model.buffers(), kept, strict=True):  # the first pass has moved running statistics
        buffer.copy_(before)

    def replay(next_x: Tensor, next_y: Tensor) -> Tensor:
        x.copy_(next_x)
        y.copy_(next_y)
        graph.replay()
        return loss

    return replay
