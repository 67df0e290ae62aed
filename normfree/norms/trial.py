"""A norm is held to its description: whatever a class overrides, what it computes is what counts."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from normfree.norms.registry import Norm

__all__ = ["why_not_as_described"]


def why_not_as_described(module: nn.Module, norm: Norm) -> str | None:
    """Run a norm of a class that is not torch's, without its hooks, and say so if it does not do what is said of it."""
    tensors = [*module.parameters(), *module.buffers()]
    own = not type(module).__module__.startswith(("torch.", "timm.", "torchvision."))
    if not own or norm.mean is None or norm.problem is not None or any(t.is_meta for t in tensors):
        return None
    trial, bare = type(module).__new__(type(module)), vars(nn.Module())
    trial.__dict__.update(module.__dict__ | {name: value for name, value in bare.items() if "hook" in name})
    trial.__dict__["training"] = False
    gain, shift = norm.affine()
    for places in ((2, 2), (), (2,), (2, 2, 2)):
        shape = [1, norm.features, *(1 for _ in places)]
        x = torch.linspace(-2, 2, 3 * gain.numel(), dtype=norm.mean.dtype, device=norm.mean.device)
        x = x.reshape(3, -1, *shape[2:]).expand(-1, -1, *places)
        with contextlib.suppress(Exception), torch.no_grad():  # it may take other shapes
            wanted = gain.reshape(shape) * x.double() + shift.reshape(shape)
            wanted = wanted if norm.act is None else norm.act(wanted.to(x.dtype)).double()
            found = trial(x.clone()).double()
            if not torch.allclose(found, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max())):
                return "computes something else than its description says; describe it with normfree.register_norm"
            return None
    return None
