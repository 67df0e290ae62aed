"""``normfree convert``, ``normfree inspect`` and ``normfree verify``."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from normfree.cli import options
from normfree.cli.jobs import each, prove, run
from normfree.cli.printing import (
    Table,
    plan_tables,
    print_json,
    print_out,
    print_table,
    progress,
    proof_table,
    quiet,
    reporting,
)

__all__ = ["convert", "inspect", "verify"]

AlphaOption = Annotated[str | None, typer.Option(metavar="START", help="Start of scalars: a number or rsqrt_depth.")]
IncludeOption = Annotated[
    list[str] | None, typer.Option(metavar="NAMES", help="Convert only norms that match (repeatable).")
]
ExcludeOption = Annotated[
    list[str] | None, typer.Option(metavar="NAMES", help="Leave norms or sums that match (repeatable).")
]
ScopeOption = Annotated[
    str, typer.Option(metavar="SCOPE", show_default=False, help="all (default), or residual: only in branches.")
]


@options.app.command(short_help="Convert a model, prove it, and write it.")
def convert(
    source: options.SourceArgument,
    out: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="File (.safetensors) or folder.")],
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Weights to load first, or a folder of such files.")
    ] = None,
    key: options.KeyOption = None,
    prefix: options.PrefixOption = "",
    pretrained: options.PretrainedOption = False,
    num_classes: options.ClassesOption = None,
    init: options.InitOption = "auto",
    alpha: AlphaOption = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    scope: ScopeOption = "all",
    reset: Annotated[bool, typer.Option("--reset/--no-reset", help="skipinit: draw weights anew.")] = True,
    hooked: Annotated[
        bool, typer.Option("--no-inplace-activations", help="For what hooks layers, as Opacus does.")
    ] = False,
    size: options.SizeOption = None,
    seed: Annotated[int, typer.Option(metavar="N", help="skipinit: seed of the draws.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    proofs: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify", show_default=False, help="Prove before writing (default); no: stream files."
        ),
    ] = True,
    as_json: options.JsonOption = False,
) -> None:
    """Convert a model, prove it, and write it with its plan; or every checkpoint of a folder.

    A file OUT must end in .safetensors; any other name is a folder for model.safetensors and timm's config.json.

    Checkpoints end in .safetensors .pth .pt .bin .tar or .ckpt. A folder of them is converted file by file; one that
    fails does not stop the rest, and the exit code is 1. With --no-verify a checkpoint is streamed from file to file,
    at the speed of the disk and in a fraction of its size in memory.
    """
    with reporting(as_json):
        asked: dict[str, Any] = {"init": init, "alpha": options.parse_alpha(alpha), "scope": scope, "reset": reset}
        asked |= {"include": include or (), "exclude": exclude or (), "inplace_activations": not hooked}
        loaded = options.Loaded(checkpoint, key, prefix, pretrained)
        one = partial(run, source, num_classes, asked, force, proofs, seed, size)
        many = checkpoint is not None and checkpoint.is_dir()
        with progress(9 if proofs else 3) as step:
            if many:
                rows = list(each(one, loaded, out, step))
            else:
                name, plan, report = one(loaded, out, step)
        ok = all(problem is None for *_, problem in rows) if many else report.ok
        if many:
            _say_all(rows, ok, as_json)
        elif as_json:
            body = {"ok": ok, "source": name, "output": str(out) if ok else None}
            print_json(body | {"plan": json.loads(plan.to_json()), **json.loads(report.to_json())})
        else:
            print_out(str(plan))
            proof_table(report.proofs)
            print_out(f"wrote {out}" if ok else f"a proof failed: {out} was not written")
        if not ok:
            raise typer.Exit(1)


def _say_all(rows: list[tuple[Path, Path, str | None]], ok: bool, as_json: bool) -> None:
    if as_json:
        files = [{"checkpoint": str(a), "output": None if why else str(b), "error": why} for a, b, why in rows]
        print_json({"ok": ok, "files": files})
        return
    shown = Table("checkpoint", "result", "file or problem")
    for path, written, problem in rows:
        shown.add(path.name, "FAILED" if problem else "wrote", problem or str(written), style="red" if problem else "")
    print_table(shown)
    print_out(f"{sum(problem is None for *_, problem in rows)} of {len(rows)} converted")


@options.app.command(short_help="Show what a conversion would do, and why.")
def inspect(
    source: options.OwnSourceArgument,
    checkpoint: options.CheckpointOption = None,
    key: options.KeyOption = None,
    prefix: options.PrefixOption = "",
    pretrained: options.PretrainedOption = False,
    num_classes: options.ClassesOption = None,
    init: options.InitOption = "auto",
    alpha: AlphaOption = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    scope: ScopeOption = "all",
    size: options.SizeOption = None,
    summary: Annotated[bool, typer.Option("--summary", help="Only what the tables add up to.")] = False,
    as_json: options.JsonOption = False,
) -> None:
    """Show what a conversion would do: every norm and every sum, with the reason."""
    with reporting(as_json):
        with progress(2) as step:
            from normfree.options import Options
            from normfree.planning.plan import look
            from normfree.tracing.trace import example_input

            loaded = options.Loaded(checkpoint, key, prefix, pretrained)
            _, model = options.build_original(source, step, loaded, num_classes, own=True)
            step("planning")
            asked: Any = {"init": init, "alpha": options.parse_alpha(alpha), "scope": scope}
            asked |= {"include": include or (), "exclude": exclude or ()}
            asked["inputs"] = None if size is None else example_input(model, size=size)
            made, _ = look(model, Options(**asked), loaded=bool(loaded))
        if as_json:
            sys.stdout.write(made.to_json() + "\n")
        else:
            if not summary:
                plan_tables(made)
            print_out(str(made))


@options.app.command(short_help="Prove a converted file.")
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that normfree convert wrote.")],
    checkpoint: options.CheckpointOption = None,
    key: options.KeyOption = None,
    prefix: options.PrefixOption = "",
    pretrained: options.PretrainedOption = False,
    size: options.SizeOption = None,
    as_json: options.JsonOption = False,
) -> None:
    """Load a converted file and print the proofs with their figures.

    With the original's weights (--checkpoint or --pretrained) proof 3 compares with the original itself, else with
    samples of its output that were recorded at conversion.
    """
    with reporting(as_json):
        with progress(7) as step:
            from normfree import checkpoint as files
            from normfree.tracing.trace import example_input

            header = files.read_header(file)
            step("loading")
            model = files.load(file)
            with quiet():
                structure = files.build_original(header, file, pretrained=pretrained)
            loaded = options.Loaded(checkpoint, key, prefix, pretrained)
            loaded.give(structure, loaded.read())
            x, original = example_input(model, size=size), structure if loaded else None
            report = prove(step, model, original, x, structure=structure, reference=header.reference)
        if as_json:
            print_json(json.loads(report.to_json()))
        else:
            proof_table(report.proofs)
        if not report.ok:
            raise typer.Exit(1)
