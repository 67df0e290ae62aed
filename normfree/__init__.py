"""normfree: any PyTorch model with BatchNorm, without it; the same class, the same methods.

    convert, convert_      take the norms out of a model: a copy, or in place
    plan, Plan             the dry run: what becomes of every norm and every sum, and why
    verify, Report         six proofs of a conversion
    calibrate, watch       before training: constants from a few images, and a warning of a rate that is too high
    param_groups, clip_grad, SkipInit    for training: groups for an optimizer, clipping, the scalar as a module
    signals, Signals       how large the signal is along a network
    save, load             a converted model as a file, and back
    fuse, restore, export  afterwards: plain layers, the norms again, a program for other runtimes
    register_norm, Norm    a norm type of your own
    errors                 what is raised, sorted by who must act

`normfree --help` is the command line. Start with `help(normfree.convert)`.
"""

import importlib
from typing import Any

from normfree import errors

__version__ = "0.1.0"
_HOMES = {  # imported when they are asked for: `normfree --help` must not import torch; the types are in __init__.pyi
    "training.calibration": ["calibrate"],
    "checkpoint": ["load", "save"],
    "conversion": ["convert", "convert_"],
    "deployment.export": ["export"],
    "deployment.fuse": ["fuse"],
    "layers": ["SkipInit"],
    "norms": ["Norm", "register_norm"],
    "training.optim": ["clip_grad", "param_groups"],
    "planning.plan": ["plan"],
    "plans": ["Plan"],
    "training.signals": ["Signals", "signals"],
    "deployment.restore": ["restore"],
    "proofs.verify": ["Report", "verify"],
    "training.watching": ["watch"],
}
__all__ = ["errors", *(name for names in _HOMES.values() for name in names)]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'normfree' has no attribute {name!r}")
    return getattr(importlib.import_module(f"normfree.{home}"), name)
