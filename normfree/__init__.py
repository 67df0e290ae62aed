"""normfree: any PyTorch model with BatchNorm, without it; the same class, the same methods."""

import importlib
from typing import TYPE_CHECKING, Any

from normfree import errors

if TYPE_CHECKING:
    from normfree.checkpoint import load, save
    from normfree.conversion import convert, convert_
    from normfree.fusing import fuse
    from normfree.layers import SkipInit
    from normfree.norms import Norm, register_norm
    from normfree.optim import clip_grad, param_groups
    from normfree.planning import plan
    from normfree.plans import Plan
    from normfree.verifying import Report, verify

__version__ = "0.1.0"
__all__ = ["Norm", "Plan", "Report", "SkipInit", "clip_grad", "convert", "convert_", "errors", "fuse", "load"]
__all__ += ["param_groups", "plan", "register_norm", "save", "verify"]
_HOMES = {"checkpoint": "load save", "conversion": "convert convert_", "fusing": "fuse", "layers": "SkipInit"}
_HOMES |= {"norms": "Norm register_norm", "optim": "clip_grad param_groups", "planning": "plan"}
_HOMES |= {"plans": "Plan", "verifying": "Report verify"}


def __getattr__(name: str) -> Any:  # lazily: `normfree --help` must not import torch
    home = next((module for module, names in _HOMES.items() if name in names.split()), None)
    if home is None:
        raise AttributeError(f"module 'normfree' has no attribute {name!r}")
    return getattr(importlib.import_module(f"normfree.{home}"), name)
