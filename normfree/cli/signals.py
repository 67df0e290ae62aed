"""``normfree signals``: what arrives at every residual sum, before the conversion and after it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from normfree.cli import options
from normfree.cli.printing import Table, note, print_json, print_out, print_table, progress, reporting

if TYPE_CHECKING:
    from normfree.training.signals import Signal

__all__ = ["signals"]


@options.app.command(short_help="Show the signal at every residual sum.")
def signals(
    source: options.OwnSourceArgument,
    checkpoint: options.CheckpointOption = None,
    key: options.KeyOption = None,
    prefix: options.PrefixOption = "",
    pretrained: options.PretrainedOption = False,
    num_classes: options.ClassesOption = None,
    init: options.InitOption = "auto",
    batch: Annotated[int, typer.Option(min=2, metavar="N", help="Images of white noise.")] = 16,
    size: Annotated[int | None, typer.Option(min=1, metavar="N", help="Height and width of an image.")] = None,
    plot: options.PlotOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Show how large skip path, residual branch and sum are at every residual sum, in train mode.

    Three times: with the norms, with the norms deleted (alpha = 1), and converted. From scratch (`skipinit`) all three
    have the same weights, as the conversion draws them.
    """
    with reporting(as_json):
        options.check_written(plot=plot)
        with progress(6) as step:
            from normfree.tracing.trace import example_input
            from normfree.training import drawing
            from normfree.training import signals as propagation

            loaded = options.Loaded(checkpoint, key, prefix, pretrained)
            name, model = options.build_original(source, step, loaded, num_classes, own=True)
            x, chosen = example_input(model, batch, size), cast(Any, init)
            measured = {}
            for title, arm in propagation.before_and_after(model, chosen):
                step(title)
                measured[title] = propagation.signals(arm, x)
            if plot is not None:
                step("drawing")
                drawing.plot(measured, plot, name)
        if plot is not None:
            note(f"wrote {plot}")
        if as_json:
            flat = {title: list(map(_flat, found.rows)) for title, found in measured.items()}
            print_json({"ok": True, "source": name, "signals": flat})
        else:
            for title, found in measured.items():
                print_out(title)
                titles, *rows = drawing.cells(found)
                shown = Table(*titles)
                for row in rows:
                    shown.add(*row)
                print_table(shown)


def _flat(row: Signal) -> dict[str, Any]:
    return asdict(row) | {"share": row.share if row.total.second else None}  # JSON knows no NaN
