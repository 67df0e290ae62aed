"""Which hooks see what passes through a module, or its gradient."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module

__all__ = ["any_global_hook", "hooks_on"]

_KINDS = tuple(
    name for name in vars(nn.Module()) if name.endswith("_hooks") and name.startswith(("_forward", "_backward"))
)


def hooks_on(module: nn.Module) -> set[str]:
    """Return the kinds of hooks that hang on a module."""
    return {kind for kind in _KINDS if module.__dict__[kind]}


def any_global_hook() -> bool:
    """Whether some hook hangs on every module."""
    return any(getattr(torch_module, f"_global{kind}", None) for kind in _KINDS)
