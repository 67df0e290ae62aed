"""torch's own batch norms."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from normfree.norms.registry import Norm, like_torchs, register_norm

__all__: list[str] = []


@register_norm(
    nn.modules.batchnorm._BatchNorm,  # of which some inherit everything but the check of the input
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.LazyBatchNorm1d,
    nn.LazyBatchNorm2d,
    nn.LazyBatchNorm3d,
    "lightly.models.batchnorm.SplitBatchNorm",  # in eval mode it is an ordinary one
)
def _batch_norm(module: Any) -> Norm:
    if isinstance(module, LazyModuleMixin):  # the first forward pass turns it into the ordinary class
        return Norm(0, None, None, None, None, 0.0, problem="has no shape yet: run one forward pass, then convert")
    return like_torchs(module)
