"""timm's norms: most of them hold a dropout and an activation of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from normfree.norms.registry import Norm, register_norm

__all__: list[str] = []


def _present(module: nn.Module | None) -> nn.Module | None:
    return None if module is None or type(module) is nn.Identity else module


@register_norm("timm.layers.norm_act.BatchNormAct2d", "timm.layers.norm_act.SyncBatchNormAct")
def _norm_act(module: Any) -> Norm:
    return Norm(
        features=module.num_features if hasattr(module, "num_features") else module.running_mean.numel(),
        mean=module.running_mean,
        var=module.running_var,
        weight=module.weight,
        bias=module.bias,
        eps=module.eps,
        drop=_present(getattr(module, "drop", None)),
        act=_present(getattr(module, "act", None)),
    )


@register_norm("timm.layers.norm_act.FrozenBatchNormAct2d")
def _frozen_norm_act(module: Any) -> Norm:
    return replace(_norm_act(module), frozen=True)
