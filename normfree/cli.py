"""The command line: parses, calls the library, prints. Nothing here imports torch before a command runs."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normfree.errors import NormfreeError, UsageError

if TYPE_CHECKING:
    from normfree.plans import Plan
    from normfree.proofs import Proof

__all__ = ["app", "main"]

app = typer.Typer(
    help="Take the BatchNorm out of any PyTorch model: same class, same methods, SkipInit instead of normalisation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SourceArgument = Annotated[
    str, typer.Argument(help="torchvision:resnet50, timm:resnet50.a1_in1k, or a bare name found in one of them.")
]
CheckpointOption = Annotated[
    Path | None, typer.Option(help="Weights to load first: .safetensors .pth .pt .bin .tar", dir_okay=False)
]
PretrainedOption = Annotated[bool, typer.Option("--pretrained", help="Load the library's own weights first.")]
ClassesOption = Annotated[int | None, typer.Option(min=1, help="Number of classes of the checkpoint's classifier.")]
InitOption = Annotated[str, typer.Option(help="auto, skipinit (from scratch) or preserve (keep the function).")]
AlphaOption = Annotated[str | None, typer.Option(help="Start of every scalar: a number or rsqrt_depth.")]
IncludeOption = Annotated[list[str] | None, typer.Option(help="Convert only norms that match (repeatable).")]
ExcludeOption = Annotated[list[str] | None, typer.Option(help="Leave norms or sums that match (repeatable).")]
ScopeOption = Annotated[str, typer.Option(help="all, or residual: only norms inside residual branches.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def main() -> None:
    """Run the command line."""
    app()


@app.command()
def convert(
    source: SourceArgument,
    out: Annotated[Path, typer.Option("-o", "--output", help="The .safetensors file to write.")],
    checkpoint: CheckpointOption = None,
    pretrained: PretrainedOption = False,
    num_classes: ClassesOption = None,
    init: InitOption = "auto",
    alpha: AlphaOption = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    scope: ScopeOption = "all",
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    proofs: Annotated[bool, typer.Option("--verify/--no-verify", help="Prove the conversion before writing.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Convert a model, prove it, and write it with its plan."""
    with _reporting(as_json):
        _convert(source, out, checkpoint, pretrained, num_classes, init, alpha, include, exclude, scope, force, proofs, as_json)


def _convert(
    source: str,
    out: Path,
    checkpoint: Path | None,
    pretrained: bool,
    num_classes: int | None,
    init: str,
    alpha: str | None,
    include: list[str] | None,
    exclude: list[str] | None,
    scope: str,
    force: bool,
    proofs: bool,
    as_json: bool,
) -> None:
    with _progress(10 if proofs else 4) as step:
        from normfree.files import check_output

        check_output(out, overwrite=force, inputs=() if checkpoint is None else (checkpoint,))
        if out.suffix != ".safetensors":
            raise UsageError(f"{out}: the output is a safetensors file; end its name in .safetensors")
        step("importing torch")
        from normfree import conversion, verifying
        from normfree.checkpoint import save
        from normfree.guards import PLAN_ATTRIBUTE
        from normfree.reference import Reference

        name, original = _original(source, checkpoint, pretrained, num_classes, step)
        step("converting")
        options: Any = {"init": init, "alpha": _alpha(alpha), "scope": scope}
        model = conversion.convert(original, include=include or (), exclude=exclude or (), **options)
        plan: Plan = getattr(model, PLAN_ATTRIBUTE)
        done: list[Proof] = []
        reference = None
        if proofs:
            x = verifying.example_input(model)
            for number, proof in enumerate(verifying.each_proof(model, original, x), start=1):
                done.append(proof)
                step(f"proof {number} of 6")
            if plan.init == "preserve" and plan.alpha == 1:
                reference = Reference.of(original, x)
        report = verifying.Report(tuple(done))
        if report.ok:
            step("writing")
            save(model, out, source=name, num_classes=num_classes, reference=reference, overwrite=force)
    if as_json:
        body = {"ok": report.ok, "source": name, "output": str(out) if report.ok else None}
        _json(body | {"plan": json.loads(plan.to_json()), **json.loads(report.to_json())})
    else:
        _print(str(plan))
        _proof_table(report.proofs)
        _print(f"wrote {out}" if report.ok else f"a proof failed: {out} was not written")
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def inspect(
    source: SourceArgument,
    checkpoint: CheckpointOption = None,
    pretrained: PretrainedOption = False,
    num_classes: ClassesOption = None,
    init: InitOption = "auto",
    alpha: AlphaOption = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    scope: ScopeOption = "all",
    as_json: JsonOption = False,
) -> None:
    """Show what a conversion would do: every norm and every sum, with the reason."""
    with _reporting(as_json):
        with _progress(3) as step:
            step("importing torch")
            from normfree.planning import plan

            _, model = _original(source, checkpoint, pretrained, num_classes, step)
            step("planning")
            options: Any = {"init": init, "alpha": _alpha(alpha), "scope": scope}
            made = plan(model, include=include or (), exclude=exclude or (), **options)
        if as_json:
            sys.stdout.write(made.to_json() + "\n")
        else:
            _plan_tables(made)
            _print(str(made))


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="A file that normfree convert wrote.")],
    checkpoint: CheckpointOption = None,
    pretrained: PretrainedOption = False,
    as_json: JsonOption = False,
) -> None:
    """Load a converted file and print the proofs with their figures.

    With the original's weights (--checkpoint or --pretrained) proof 3 compares with the original itself, else with
    samples of its output that were recorded at conversion.
    """
    with _reporting(as_json):
        with _progress(8) as step:
            step("importing torch")
            from normfree import checkpoint as files
            from normfree import verifying
            from normfree.files import load_weights, read_state_dict

            header = files.read_header(file)
            step("loading")
            model = files.load(file)
            structure = files.build_original(header, file, pretrained=pretrained)
            if checkpoint is not None:
                load_weights(structure, read_state_dict(checkpoint), checkpoint)
            known = pretrained or checkpoint is not None
            done = []
            proofs = verifying.each_proof(
                model, structure if known else None, structure=structure, reference=header.reference
            )
            for number, proof in enumerate(proofs, start=1):
                done.append(proof)
                step(f"proof {number} of 6")
        report = verifying.Report(tuple(done))
        if as_json:
            _json(json.loads(report.to_json()))
        else:
            _proof_table(report.proofs)
        if not report.ok:
            raise typer.Exit(1)


def _original(source: str, checkpoint: Path | None, pretrained: bool, num_classes: int | None, step: Any) -> Any:
    """Build the model that is to be converted; return its unambiguous name with it."""
    from normfree import zoo
    from normfree.files import load_weights, read_state_dict

    found = zoo.find(source)
    if found.note:
        _note(found.note)
    step(f"building {found}")
    # The checkpoint first: a file that cannot be read should not cost the time of building.
    state = None if checkpoint is None else read_state_dict(checkpoint)
    model = zoo.build(found, pretrained=pretrained and state is None, num_classes=num_classes)
    if state is not None and checkpoint is not None:
        load_weights(model, state, checkpoint)
    return str(found), model


def _alpha(text: str | None) -> float | str | None:
    if text is None or text == "rsqrt_depth":
        return text
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--alpha is {text!r}; it must be a number or rsqrt_depth") from None


@contextlib.contextmanager
def _reporting(as_json: bool) -> Iterator[None]:
    """Exit 2 for wrong usage, 1 for what cannot be converted or read, with the message and no traceback."""
    try:
        yield
    except NormfreeError as error:
        if as_json:
            _json({"ok": False, "error": type(error).__name__, "message": str(error)})
        else:
            _note(f"error: {error}", style="red")
        from normfree.errors import AlreadyConvertedError, NoNormError

        wrong_usage = isinstance(error, UsageError) and not isinstance(error, (NoNormError, AlreadyConvertedError))
        raise typer.Exit(2 if wrong_usage else 1) from error


@contextlib.contextmanager
def _progress(steps: int) -> Iterator[Any]:
    """Show a bar on stderr while the work goes on; ``step(text)`` says what comes next."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=steps)

        def step(text: str) -> None:
            progress.update(task, description=text, advance=1)

        yield step


def _plan_tables(plan: Plan) -> None:
    norms = _table("norm", "type", "fed by", "becomes", "why")
    for edit in plan.norms:
        norms.add_row(edit.name, edit.type, edit.feed, edit.action, edit.reason)
    _print(norms)
    sums = _table("sum", "kind", "alpha", "why")
    for total in plan.sums:
        tails = [f"{a.path} ({a.place}{'' if a.channels is None else f' {a.channels}'})" for a in total.alphas]
        sums.add_row(total.name, total.kind, "\n".join(tails) or "none", "\n".join((total.reason, *total.declined)))
    if plan.sums:
        _print(sums)


def _proof_table(proofs: tuple[Proof, ...]) -> None:
    if not proofs:
        return
    words = {True: "[green]ok[/]", False: "[red]FAILED[/]", None: "not claimed"}
    table = _table("", "proof", "", "figures")
    for proof in proofs:
        table.add_row(str(proof.number), proof.name, words[proof.passed], proof.detail)
    _print(table)


def _table(*columns: str) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print(what: Any) -> None:
    from rich.console import Console

    Console(soft_wrap=isinstance(what, str), highlight=False, markup=not isinstance(what, str)).print(what)


def _note(text: str, style: str = "yellow") -> None:
    from rich.console import Console

    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(text, style=style)


def _json(body: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(body) + "\n")
