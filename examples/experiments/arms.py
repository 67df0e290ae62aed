"""What fine-tuning puts in the place of the norms of a pretrained model."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

import normfree
from normfree.bench.arms import Subject, build_arms
from normfree.deployment.fuse import FuseWarning
from normfree.norms import find_norms

NORMS = ("normfree", "fused", "bn", "frozen", "groupnorm")
CONVERTED = ("normfree", "fused")  # as `convert` returns it, or with gain and alpha baked into the weights


def arm(norm: str, model: nn.Module, init: str = "preserve", alpha: float | None = None) -> tuple[nn.Module, list[Any]]:
    """Put something in the place of the norms of a model; return it with the norms that stay in eval mode."""
    if norm in CONVERTED:
        model = normfree.convert(model, init=init, alpha=alpha)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FuseWarning)  # the norms of a pre-activation network stay operations
            return normfree.fuse(model) if norm == "fused" else model, []
    if norm == "groupnorm":  # as Opacus' ModuleValidator.fix does it, and in timm's norm-and-activation layers too
        return build_arms(Subject("timm", model, "preserve"), (norm,))[norm], []
    frozen = find_norms(model) if norm == "frozen" else ()
    return model, [model.get_submodule(name) for name in frozen]
