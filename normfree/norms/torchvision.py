"""torchvision's frozen batch norm: statistics and affine are buffers."""

from __future__ import annotations

from typing import Any

from normfree.norms.registry import Norm, register_norm

__all__: list[str] = []


@register_norm("torchvision.ops.misc.FrozenBatchNorm2d")
def _frozen(module: Any) -> Norm:
    return Norm(
        features=module.running_mean.numel(),
        mean=module.running_mean,
        var=module.running_var,
        weight=module.weight,
        bias=module.bias,
        eps=module.eps,
        frozen=True,
    )
