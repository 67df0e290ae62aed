"""Draw how large the signal is along a network: with its norms, with the norms deleted, and converted.

All three start from scratch, on the same white noise. The README shows what this draws by default.

Run: python examples/draw_signals.py [--model resnetv2_50] [--out signals.png]
"""

from __future__ import annotations

from argparse import ArgumentParser

import timm
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import normfree


def main() -> None:
    """Measure three times, and draw."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnetv2_50", help="a name that timm knows")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    parser.add_argument("--out", default="signals.png")
    options = parser.parse_args()
    torch.manual_seed(0)
    x, original = torch.randn(16, 3, options.size, options.size), timm.create_model(options.model)
    arms = {
        "with its norms": original,
        "norms deleted": normfree.convert(original, init="skipinit", alpha=1.0),
        "normfree": normfree.convert(original, init="skipinit"),
    }
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    signal, share = figure.subplots(1, 2)
    for width, (name, model) in zip((3, 2, 1), arms.items(), strict=True):  # where lines coincide, all are seen
        rows = normfree.signals(model, x).rows
        places = range(1, len(rows) + 1)
        signal.plot(places, [row.total.second for row in rows], marker=".", linewidth=width, label=name)
        share.plot(places, [row.share for row in rows], marker=".", linewidth=width)
        print(f"{name:15} second moment of the last sum {rows[-1].total.second:10.3g}")
    for axis in (signal, share):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    signal.set(yscale="log", title="size of the signal (second moment)", xlabel="residual block")
    share.set(ylim=(-0.02, 1), title="share of the branch in the sum", xlabel="residual block")
    signal.legend()
    figure.savefig(options.out, dpi=100)


if __name__ == "__main__":
    main()
