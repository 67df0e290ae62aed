"""Frozen batch norms of torchvision and of those who copied it: statistics and affine are buffers."""

from __future__ import annotations

from typing import Any

from normfree.norms.registry import Norm, like_torchs, register_norm

__all__: list[str] = []


@register_norm(
    "torchvision.ops.misc.FrozenBatchNorm2d",
    "detectron2.layers.batch_norm.FrozenBatchNorm2d",
    "mmcv.*.FrozenBatchNorm2d",
    "mmdet.*.FrozenBatchNorm2d",
    "transformers.models.*FrozenBatchNorm2d",  # every detector there has a copy of its own
)
def _frozen(module: Any) -> Norm:
    return like_torchs(module, frozen=True)
