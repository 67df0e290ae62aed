"""How the experiments draw: lines told apart where they coincide, outliers at the edge, diverged runs marked.

An axis is chosen for what most values are. What lies beyond is drawn at its edge, with its value; a run that diverged,
whose value is no number, is a cross there.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (2.5, 1.5)), (0, (9, 2)))
MARKERS = "os^vDP"


def style(number: int, count: int) -> dict[str, Any]:
    """Return how line `number` of `count` looks: later ones are thinner, so that earlier ones show on both sides."""
    width = 1.2 + 0.5 * (count - 1 - number)
    marker = {"marker": MARKERS[number % len(MARKERS)], "markersize": 3 + width, "markerfacecolor": "none"}
    return {"color": f"C{number}", "linestyle": DASHES[number % len(DASHES)], "linewidth": width, **marker}


def limits(values: list[float], least: float = -math.inf, most: float = math.inf) -> tuple[float, float]:
    """Return the ends of an axis on which no outlier leaves the others a strip: those within Tukey's fences decide."""
    real = sorted(value for value in values if math.isfinite(value))
    if len(real) < 2 or real[0] == real[-1]:
        middle = real[0] if real else 0.0
        return max(middle - 1, least), min(middle + 1, most)
    first, _, third = statistics.quantiles(real, n=4, method="inclusive")
    reach = 1.5 * (third - first or real[-1] - real[0])
    within = [value for value in real if first - reach <= value <= third + reach]
    low, high = within[0], within[-1]
    margin = 0.06 * (high - low)
    return max(low - margin, least), min(high + margin, most)


def line(axis: Any, points: Mapping[float, float], look: Mapping[str, Any], label: str = "", *, best: str) -> None:
    """Draw a line into an axis whose limits are set.

    Args:
        axis: The axis.
        points: Its values by place; what diverged is not a number, or infinite.
        look: What :func:`style` returns.
        label: What the legend says.
        best: Whether the best values are "high" or "low": what diverged is drawn at the other edge.
    """
    low, high = axis.get_ylim()
    within = {x: y if math.isfinite(y) and low <= y <= high else math.nan for x, y in points.items()}
    axis.plot(list(points), [_into(y, low, high) for y in points.values()], **{**look, "marker": ""})
    axis.plot(list(within), list(within.values()), **{**look, "linestyle": ""})
    axis.plot([], [], **look, label=label)
    edges = axis.get_xaxis_transform()
    for x, y in points.items():
        if math.isnan(within[x]):
            gone, above = not math.isfinite(y), y > high
            at, sign = (0.0 if best == "high" else 1.0, "X") if gone else (float(above), "^" if above else "v")
            size = look["markersize"] + 2
            axis.plot([x], [at], sign, color=look["color"], markersize=size, transform=edges, clip_on=False)
            if not gone:
                place = {"xytext": (-7, -10 if above else 4), "textcoords": "offset points", "ha": "right"}
                place |= {"zorder": 10, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 0.5}}
                axis.annotate(f"{y:.3g}", (x, at), xycoords=edges, fontsize=7, color=look["color"], **place)


def _into(value: float, low: float, high: float) -> float:
    """Return a value within the limits; one that is no number stays none, and breaks the line."""
    return min(max(value, low), high) if math.isfinite(value) else math.nan
