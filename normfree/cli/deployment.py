"""``normfree fuse``, ``restore`` and ``export``: from a converted file to inference, to batch norms, out of PyTorch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from normfree.cli.options import JsonOption, app
from normfree.cli.printing import note, print_json, print_out, progress, reporting

__all__ = ["export", "fuse", "restore"]

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A file, or its folder, that normfree wrote.")]
OutOption = Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="File (.safetensors) or folder.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]


@app.command(short_help="Bake gain and alpha into plain layers.")
def fuse(file: FileArgument, out: OutOption, force: ForceOption = False, as_json: JsonOption = False) -> None:
    """Bake gain and alpha into plain layers, for inference: the same outputs, and nothing is multiplied any more."""
    _turn(file, out, force, as_json, restored=False)


@app.command(short_help="Give a converted file its batch norms back.")
def restore(file: FileArgument, out: OutOption, force: ForceOption = False, as_json: JsonOption = False) -> None:
    """Give a file that was converted with `preserve` its batch norms back, for tools that expect them.

    The output has the original's keys, and its values where nothing was trained since; else the norms compute in eval
    mode what gain, bias and alpha amount to. A folder can be read by `timm.create_model("local-dir:FOLDER")`.
    """
    _turn(file, out, force, as_json, restored=True)


@app.command(short_help="Write a program: torch.export or ONNX.")
def export(
    file: FileArgument,
    out: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="A .pt2 or .onnx file.")],
    format: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="pt2 or onnx; by default what OUT ends in.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Height and width; by default the network's.")
    ] = None,
    dynamic_size: Annotated[bool, typer.Option("--dynamic-size", help="Take any height and width.")] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a converted or fused file as a program for other runtimes, for any batch: torch.export, or ONNX.

    The model is fused first. The program is run (ONNX by onnxruntime), and its output compared with the model's.
    """
    with reporting(as_json):
        with progress(3) as step:
            from normfree import checkpoint, files, zoo
            from normfree.deployment import export as exporting
            from normfree.deployment import fuse as fusing
            from normfree.tracing.inputs import tensors
            from normfree.tracing.trace import example_input

            exporting.format_of(out, format)
            files.check_output(out, overwrite=force, inputs=(checkpoint.weights_in(file),))
            step("loading")
            header, model = checkpoint.read_header(file), checkpoint.load(file).eval()
            if not header.plan.fused:
                fusing.bake_(model)
            step("exporting")
            source = None if header.source is None else zoo.find(header.source)
            own = header.input_size or zoo.own_shape(model, source)
            x = exporting.own_input(model, own) if size is None else example_input(model, size=size)
            given = tensors(x)[0]
            error = exporting.export(model, out, x, dynamic_size=dynamic_size, overwrite=force)
        sizes = ("H", "W")[: given.dim() - 2] if dynamic_size else given.shape[2:]
        taken = ["N", *given.shape[1:2], *sizes]
        if as_json:
            print_json({"ok": True, "output": str(out), "input": taken, "difference": error})
        else:
            print_out(
                f"wrote {out}: input ({', '.join(map(str, taken))}); "
                f"output within {error:.1e} of the model's, relative to its largest"
            )


def _turn(file: Path, out: Path, force: bool, as_json: bool, *, restored: bool) -> None:
    """Give a file its norms back, or fuse it; write it, and say what was warned about."""
    with reporting(as_json):
        with progress(3) as step:
            from normfree import checkpoint
            from normfree.deployment import fuse as fusing
            from normfree.deployment import restore as restoring

            checkpoint.check_target(out, overwrite=force, inputs=(checkpoint.weights_in(file),))
            step("loading")
            header, model = checkpoint.read_header(file), checkpoint.load(file).eval()
            step("computing")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", fusing.FuseWarning)
                (restoring.restore_ if restored else fusing.fuse_)(model)
            step("writing")
            if restored:
                checkpoint.write(model, out, header, overwrite=force, converted=False)
            else:
                known: Any = {name: getattr(header, name) for name in ("reference", "input_size", "num_classes")}
                checkpoint.save(model, out, source=header.source, overwrite=force, **known)
        left = [str(warning.message) for warning in caught]
        for text in left:
            note(text)
        if as_json:
            print_json({"ok": True, "output": str(out), "warnings": left})
        else:
            print_out(f"wrote {out}")
