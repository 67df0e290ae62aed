"""timm's norms: most of them hold a dropout and an activation of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from normfree.norms.registry import Norm, like_torchs, register_norm

__all__: list[str] = []


@register_norm("timm.layers.norm_act.BatchNormAct2d", "timm.layers.norm_act.SyncBatchNormAct")
def _norm_act(module: Any) -> Norm:
    own = {name: getattr(module, name, None) for name in ("drop", "act")}
    return like_torchs(module, **{name: part for name, part in own.items() if type(part) is not nn.Identity})


@register_norm("timm.layers.norm_act.FrozenBatchNormAct2d")
def _frozen_norm_act(module: Any) -> Norm:
    return replace(_norm_act(module), frozen=True)
