"""What is one operation to a look: norms, layers, activations, and composites that hold nothing of interest."""

from __future__ import annotations

import inspect

import torch
from torch import nn

from normfree.layers import ChannelAffine, ScaledWeight, SkipInit
from normfree.norms import is_norm
from normfree.tracing.roles import Role, elementwise, module_role

__all__ = ["calls_batch_norm", "is_layer"]


def is_layer(module: nn.Module) -> bool:
    """Whether nothing that the analysis asks about lies inside: a layer or an activation, but no composite.

    To be asked before a run and not during one, when calling anything would be recorded.
    """
    if is_norm(module) or isinstance(module, (SkipInit, ChannelAffine, ScaledWeight, torch.jit.ScriptModule)):
        return True
    if isinstance(module, nn.Sequential) or calls_batch_norm(module):
        return False
    if type(module).__module__.startswith("torch.nn"):
        return True
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
        return not any(is_norm(m) for m in module.children())
    if any(True for _ in module.children()):
        # Without a norm only what may be a projection, a gate or a tail is worth a look: attention is not.
        return not any(map(_is_of_interest, module.modules()))
    return module_role(module) is not Role.OTHER or elementwise(module)


def _is_of_interest(module: nn.Module) -> bool:
    """Whether a module makes a composite worth a look: a norm of any form, or what a skip path or a tail may be."""
    if is_norm(module) or isinstance(module, nn.modules.conv._ConvNd) or calls_batch_norm(module):
        return True
    return module_role(module) in (Role.POOL, Role.PAD, Role.UPSAMPLE)


def calls_batch_norm(module: nn.Module) -> bool:
    """Whether the module's own forward names ``batch_norm``: then its graph shows what is normalised."""
    if is_norm(module):
        return False
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and any("batch_norm" in name and not hasattr(module, name) for name in code.co_names)
