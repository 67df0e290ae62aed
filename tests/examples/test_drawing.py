"""What the pictures of the experiments show where lines coincide, outliers squeeze, and runs diverge."""

from __future__ import annotations

import math
from typing import Any

import matplotlib.colors
from drawing import limits, line, style
from matplotlib.figure import Figure

NAN = math.nan


def axis(low: float, high: float) -> Any:
    made = Figure().subplots()
    made.set_ylim(low, high)
    return made


def marks(of: Any) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for drawn in of.lines:
        if drawn.get_transform() != of.transData and len(drawn.get_xdata()):
            found.setdefault(drawn.get_marker(), []).append((float(drawn.get_xdata()[0]), float(drawn.get_ydata()[0])))
    return found


def test_lines_that_coincide_are_told_apart_without_their_colour() -> None:
    looks = [style(i, 6) for i in range(6)]
    assert len({(str(look["linestyle"]), look["marker"]) for look in looks}) == 6
    widths = [look["linewidth"] for look in looks]
    assert widths == sorted(widths, reverse=True), "what is drawn later leaves the earlier ones seen"
    assert len(set(widths)) == 6


def test_an_outlier_does_not_squeeze_the_others() -> None:
    low, high = limits([97.0, 98.0, 98.5, 99.0, 97.5, 10.0, NAN], 0, 100)
    assert (96 < low < 97, 99 < high < 100) == (True, True)
    low, high = limits([0.1, 50.0, 99.0], 0, 100)
    assert low < 1 < 99 < high, "what is spread is no outlier"
    assert limits([], 0, 100) == (0, 1)
    assert limits([70.0, 70.0]) == (69, 71)


def test_an_outlier_stands_at_the_edge_with_its_value() -> None:
    drawn = axis(96, 100)
    line(drawn, {1: 98.0, 2: 10.0, 3: 101.0}, style(0, 1), "a", best="high")
    assert marks(drawn) == {"v": [(2, 0)], "^": [(3, 1)]}
    assert [text.get_text() for text in drawn.texts] == ["10", "101"]
    assert drawn.get_ylim() == (96, 100)
    assert drawn.get_legend_handles_labels()[1] == ["a"]


def test_a_run_that_diverged_is_a_cross_at_the_bad_end() -> None:
    for best, edge in (("high", 0.0), ("low", 1.0)):
        drawn = axis(0, 1)
        line(drawn, {1: 0.5, 2: NAN, 3: math.inf}, style(0, 1), best=best)
        assert marks(drawn) == {"X": [(2, edge), (3, edge)]}
        assert matplotlib.colors.same_color(drawn.lines[-1].get_color(), "C0")
        assert not drawn.texts
