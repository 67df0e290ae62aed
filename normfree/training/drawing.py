"""Tables and pictures of signals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfree.errors import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from normfree.training.signals import Signals

__all__ = ["PARTS", "cells", "figure", "plot"]

PARTS = {"skip": "skip", "branch": "branch", "total": "sum"}
"""What is measured of a sum, with what people call it."""


def cells(measured: Signals) -> list[list[str]]:
    """Return what a table shows, its titles first."""
    titles = [f"{part} {moment}" for part in PARTS.values() for moment in ("x2", "mean2", "var")]
    lines = [["sum", *titles, "share"]]
    for row in measured.rows:
        moments = [n for part in PARTS for n in asdict(getattr(row, part)).values()]
        lines.append([row.name, *(f"{n:.3g}" for n in moments), f"{row.share:.3f}"])
    return lines


def plot(panels: Mapping[str, Signals], path: str | Path, title: str = "") -> None:
    """Draw several measurements side by side, each under its own title.

    Raises:
        UsageError: matplotlib is not installed.
    """
    require("matplotlib", "plot")
    figure(panels, title).savefig(str(path), dpi=150)


_LOOKS: dict[str, dict[str, Any]] = {  # where two coincide, both are seen: a broad band, dashes, and dots upon them
    "total": {"color": "tab:green", "linewidth": 6, "alpha": 0.35},
    "skip": {"color": "tab:blue", "linestyle": "--", "marker": "o", "markersize": 6, "markerfacecolor": "none"},
    "branch": {"color": "tab:orange", "linewidth": 1, "marker": ".", "markersize": 4},
}


def figure(panels: Mapping[str, Signals], title: str = "") -> Figure:
    """Return what :func:`plot` writes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    made = Figure(figsize=(4 * len(panels), 6), layout="constrained")
    moments, shares = made.subplots(2, len(panels), sharey="row", squeeze=False)
    found = [getattr(row, part).second for measured in panels.values() for row in measured.rows for part in PARTS]
    sizes = sorted(size for size in found if 0 < size < math.inf) or [1.0]
    # Zero has no place on a logarithmic axis: it is a decade below the smallest value, a thousandth at most.
    least = 10.0 ** math.floor(math.log10(max(sizes[0], 1e-3 * sizes[len(sizes) // 2])))
    for name, measured, above, below in zip(panels, panels.values(), moments, shares, strict=True):
        for part, look in _LOOKS.items():
            values = {i: getattr(row, part).second for i, row in enumerate(measured.rows, start=1)}
            _line(above, values, math.inf, label=PARTS[part], **look)
        above.set_yscale("symlog", linthresh=least, linscale=0.5)
        above.set_title(name, fontsize=10)
        _line(below, {i: row.share for i, row in enumerate(measured.rows, start=1)}, 1.0, color="tab:red", marker=".")
        below.set_ylim(-0.03, 1.03)
        for axis in (above, below):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    moments[0].set_ylabel("second moment")
    moments[0].set_ylim(-0.3 * least, 3 * sizes[-1])  # of the whole row
    moments[0].legend(fontsize=8)
    shares[0].set_ylabel("share of the branch in the sum")
    made.suptitle(title)
    made.supxlabel("residual sum")
    return made


def _line(axis: Any, values: Mapping[int, float], most: float, color: str, **look: Any) -> None:
    """Draw a line; what is larger than ``most`` is an arrow at the upper edge, what is not finite a cross."""
    drawn = [value if value <= most and value < math.inf else math.nan for value in values.values()]
    axis.plot(list(values), drawn, color=color, **look)
    for marker, places in (
        ("^", [i for i, value in values.items() if most < value < math.inf]),
        ("X", [i for i, value in values.items() if value == math.inf]),
    ):
        axis.plot(places, [0.97] * len(places), marker, color=color, transform=axis.get_xaxis_transform())
