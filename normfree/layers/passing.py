"""What gain and bias of a channel may be moved behind: ``f(g x + b) == g f(x) + b``, or with the bias left in front."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import nn

__all__ = ["Moves", "passes", "weakest"]

Moves = Literal["affine", "positive", "gain"]
"""What may be moved: gain and bias; both, if every gain is above zero; such gains alone, and a bias stays in front:
``relu(g x + b) == g relu(x + b / g)``."""
_ORDER: tuple[Moves, ...] = ("affine", "positive", "gain")


def weakest(moves: Iterable[Moves | None]) -> Moves | None:
    """Return what may be moved behind all of several layers; ``None`` if nothing may."""
    found = list(moves)
    return None if None in found else max(found, key=_ORDER.index, default="affine")  # type: ignore[arg-type]  # no None


def passes(module: nn.Module) -> Moves | None:
    """Return what may be moved behind a layer, or ``None``."""
    rule = _RULES.get(type(module))  # a subclass may do anything
    return rule(module) if callable(rule) else rule


def _average(pool: Any) -> Moves | None:
    """An average of zeros as well is one of another number of values, and so is any other divisor."""
    padded = any(pool.padding) if isinstance(pool.padding, tuple) else pool.padding
    whole = not (padded and pool.count_include_pad) and getattr(pool, "divisor_override", None) is None
    return "affine" if whole else "gain"


def _largest(pool: Any) -> Moves | None:
    return None if pool.return_indices else "positive"


_RULES: dict[type[nn.Module], Moves | Callable[[Any], Moves | None]] = {
    nn.Identity: "affine",
    nn.Flatten: lambda m: "affine" if (m.start_dim, m.end_dim) == (1, -1) else None,
    nn.Sequential: lambda m: weakest(map(passes, m)),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), lambda m: "gain" if m.p else "affine"),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), "affine"),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), _average),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), _largest),
    **dict.fromkeys((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d), _largest),
    **dict.fromkeys((nn.ReLU, nn.LeakyReLU, nn.PReLU), "gain"),
}
