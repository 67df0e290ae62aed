"""``normfree bench``: what normalisation costs on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normfree.cli import options
from normfree.cli.printing import Table, note, print_json, print_out, print_table, progress, reporting

if TYPE_CHECKING:
    from normfree.bench import Result

__all__ = ["bench"]


@options.app.command(short_help="Measure a training step, with norms or none.")
def bench(
    source: options.OwnSourceArgument,
    num_classes: options.ClassesOption = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Images a step.")] = 16,
    size: Annotated[int, typer.Option(metavar="N", help="Height and width of an image.")] = 224,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="fp32, or autocast's: bf16, fp16.")] = "fp32",
    compiled: Annotated[bool, typer.Option("--compile", help="Run every arm under torch.compile.")] = False,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Memory format of models and images.")] = False,
    arms: Annotated[
        str, typer.Option(metavar="ARMS", show_default=False, help="Which arms, by commas; all but biases by default.")
    ] = "bn,frozen,groupnorm,activation,normfree,bare,nf",
    init: Annotated[str, typer.Option(metavar="INIT", help="skipinit or preserve.")] = "skipinit",
    largest: Annotated[
        bool, typer.Option(show_default=False, help="On a GPU, look for the largest batch (default).")
    ] = True,
    runs: Annotated[int, typer.Option(metavar="N", help="Rounds by the clock; 0 only counts.")] = 10,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the rows there.", dir_okay=False)] = None,
    plot: options.PlotOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Measure a training step with its norms, without them, and with what others put in their place.

    Every arm takes its turn in every round; medians, and medians of ratios within a round. `bn`: the original.
    `frozen`: its norms in eval mode. `groupnorm`: as Opacus would fix it. `activation`: alpha on activations.
    `normfree`: what convert makes. `biases`: norms deleted, biases in their place. `bare`: without those too.
    `nf`: timm's nf_ model.
    """
    with reporting(as_json):
        options.check_written(csv, plot)
        with progress(4 + 2 * arms.count(",") + runs) as step:
            from normfree.bench import Setting, arm_names, run
            from normfree.bench.results import flat, write_csv, write_plot

            chosen: Any = init
            setting = Setting(
                batch, size, device, dtype, compiled, channels_last, chosen, runs, arm_names(arms), largest
            )
            name, model = options.build_original(source, step, num_classes=num_classes, own=True)
            results = run(name, model, setting, step)
        rows = [flat(result, setting.about(name)) for result in results]
        if csv is not None:
            write_csv(rows, csv)
            note(f"wrote {csv}")
        if plot is not None:
            write_plot(results, f"{name}, batch {batch}, {size} px, {rows[0]['device']}, {dtype}", plot)
            note(f"wrote {plot}")
        if as_json:
            ratios = {r.arm: {other: round(to.median, 4) for other, to in r.step_to.items()} for r in results}
            print_json({"ok": True, "rows": rows, "step_to": ratios})
        else:
            _print(results, rows[0])


def _print(results: tuple[Result, ...], about: dict[str, Any]) -> None:
    said = ("model", "init", "batch", "size", "device", "dtype", "runs", "threads", "versions")
    print_out(", ".join(f"{key} {about[key]}" for key in said))
    columns = ("arm", "step ms", "images/s", "to bn", "to bare", "forward ms", "fused ms")
    shown = Table(*columns, "saved MiB/image", "constant", "operators", "on activations", "kernels", "peak MiB", "fits")
    for result in results:
        step, peak = result.step_ms, result.peak_bytes
        shown.add(
            result.arm,
            _cell(step, ".0f"),
            _cell(step and 1e3 * about["batch"] / step.median, ".1f"),
            *(_cell(result.step_to.get(other), ".3f") for other in ("bn", "bare")),
            *(_cell(spread and spread.median, ".0f") for spread in (result.forward_ms, result.fused_ms)),
            *(_cell(size / 2**20, ".1f") for size in (result.saved_per_image, result.saved_constant)),
            *map(_cell, (result.operators, result.activation_operators, result.kernels)),
            *map(_cell, (peak and peak >> 20, result.largest_batch)),
        )
    print_table(shown)


def _cell(figure: object, spec: str = "") -> str:
    return "" if figure is None else format(figure, spec)
