"""``normfree convert``, ``normfree inspect`` and ``normfree verify``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normfree.cli.options import (
    CheckpointOption,
    ClassesOption,
    InitOption,
    JsonOption,
    PretrainedOption,
    SourceArgument,
    app,
    build_original,
    parse_alpha,
)
from normfree.errors import UsageError
from normfree.printing import plan_tables, print_json, print_out, progress, proof_table, reporting

if TYPE_CHECKING:
    from normfree.plans import Plan
    from normfree.proofs import Proof

__all__ = ["convert", "inspect", "verify"]

AlphaOption = Annotated[str | None, typer.Option(help="Start of every scalar: a number or rsqrt_depth.")]
IncludeOption = Annotated[list[str] | None, typer.Option(help="Convert only norms that match (repeatable).")]
ExcludeOption = Annotated[list[str] | None, typer.Option(help="Leave norms or sums that match (repeatable).")]
ScopeOption = Annotated[str, typer.Option(help="all, or residual: only norms inside residual branches.")]


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
    reset: Annotated[bool, typer.Option("--reset/--no-reset", help="skipinit: draw rescaled weights anew.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    proofs: Annotated[bool, typer.Option("--verify/--no-verify", help="Prove the conversion before writing.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Convert a model, prove it, and write it with its plan."""
    with reporting(as_json):
        with progress(10 if proofs else 4) as step:
            from normfree.files import check_output

            check_output(out, overwrite=force, inputs=() if checkpoint is None else (checkpoint,))
            if out.suffix != ".safetensors":
                raise UsageError(f"{out}: the output is a safetensors file; end its name in .safetensors")
            step("importing torch")
            from normfree import conversion, verifying
            from normfree.checkpoint import save
            from normfree.guards import PLAN_ATTRIBUTE
            from normfree.inputs import example_input
            from normfree.reference import Reference

            name, original = build_original(source, step, checkpoint, pretrained, num_classes)
            step("converting")
            options: Any = {"init": init, "alpha": parse_alpha(alpha), "scope": scope, "reset": reset}
            model = conversion.convert(original, include=include or (), exclude=exclude or (), **options)
            plan: Plan = getattr(model, PLAN_ATTRIBUTE)
            done: list[Proof] = []
            reference = None
            if proofs:
                x = example_input(model)
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
            print_json(body | {"plan": json.loads(plan.to_json()), **json.loads(report.to_json())})
        else:
            print_out(str(plan))
            proof_table(report.proofs)
            print_out(f"wrote {out}" if report.ok else f"a proof failed: {out} was not written")
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
    with reporting(as_json):
        with progress(3) as step:
            step("importing torch")
            from normfree.planning import plan

            _, model = build_original(source, step, checkpoint, pretrained, num_classes)
            step("planning")
            options: Any = {"init": init, "alpha": parse_alpha(alpha), "scope": scope}
            made = plan(model, include=include or (), exclude=exclude or (), **options)
        if as_json:
            sys.stdout.write(made.to_json() + "\n")
        else:
            plan_tables(made)
            print_out(str(made))


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
    with reporting(as_json):
        with progress(8) as step:
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
            print_json(json.loads(report.to_json()))
        else:
            proof_table(report.proofs)
        if not report.ok:
            raise typer.Exit(1)
