"""What leaves PyTorch: the smallest network of every file of the support table, converted, fused and exported.

Each becomes a torch.export program and an ONNX graph (`normfree.export`, which compares them with the model), is
scripted or traced by TorchScript, and compiled as one graph. Where a way fails it is tried on the original too, in eval
mode with its norms in it: what no form of a network can do is told from what the conversion costs. A run can be
stopped at any time and goes on where it was; `support_table.py --render` puts the table into its page.

Run: python examples/experiments/export_table.py [--csv FILE] [NAME ...]
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import support_table
import torch
from rich.progress import track
from torch import Tensor, nn
from unusual_inputs import largest_error

import normfree
from normfree import zoo
from normfree.errors import one_line
from normfree.norms import find_norms
from normfree.tracing.inputs import tensors

TOLERANCE = 1e-4


def pt2(model: nn.Module, x: Tensor) -> str:
    """Export a model to a torch.export program for any batch."""
    return written(model, x, "pt2")


def onnx(model: nn.Module, x: Tensor) -> str:
    """Export a model to an ONNX graph for any batch."""
    return written(model, x, "onnx")


def written(model: nn.Module, x: Tensor, ending: str) -> str:
    """Export a converted model, and compare; of one with norms, which that refuses, ask torch's exporter alone."""
    with tempfile.TemporaryDirectory() as folder:
        if not find_norms(model):
            normfree.export(model, Path(folder) / f"model.{ending}", x)
            return "ok"
    batch = {0: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(model, (x,), dynamic_shapes=(batch,))
    if ending == "onnx":
        torch.onnx.export(exported, dynamo=True, verbose=False)
    return "ok"


def torchscript(model: nn.Module, x: Tensor) -> str:
    """Script a model, or trace what cannot be scripted."""
    try:
        close(torch.jit.script(model), model, x)
    except Exception:  # whatever its own code leads TorchScript to
        close(torch.jit.trace(model, x), model, x)
        return "ok (trace)"
    return "ok"


def compiled(model: nn.Module, x: Tensor) -> str:
    """Compile a model as one graph; the code that is generated from it is torch's affair."""
    torch._dynamo.reset()
    close(torch.compile(model, backend="aot_eager", fullgraph=True), model, x)
    return "ok"


def close(other: Callable[[Tensor], object], model: nn.Module, x: Tensor) -> None:
    """Compare what two forms of a model return for another batch."""
    larger = torch.cat([x, x[:1]])
    error = largest_error(tensors(model(larger.clone())), tensors(other(larger.clone())))
    if not error <= TOLERANCE:
        raise ValueError(f"its output differs by {error:.1e}")


WAYS: dict[str, Callable[[nn.Module, Tensor], str]] = {
    "pt2": pt2,
    "onnx": onnx,
    "torchscript": torchscript,
    "compile": compiled,
}
COLUMNS = ("model", "file", "input", *WAYS, "seconds", "versions")


@torch.no_grad()
def measure(name: str) -> dict[str, str]:
    """One row: each way with what became of it."""
    start = time.perf_counter()
    row = {"model": name, "file": support_table.file_of(name), "input": "", **dict.fromkeys(WAYS, "")}
    original = zoo.build(zoo.find(name))
    try:
        x = support_table.fitting(original)
        support_table.settled(original, x)
    except (TypeError, ValueError):  # detectors take lists of images, RAFT two images
        row |= dict.fromkeys(WAYS, "not tried: takes more than one tensor")
    else:
        row["input"] = "x".join(map(str, x.shape))
        fused = normfree.fuse(normfree.convert(original, init="preserve")).eval()
        for way, run in WAYS.items():
            row[way] = attempt(run, fused, x)
            if not row[way].startswith("ok") and not attempt(run, original.eval(), x).startswith("ok"):
                row[way] = f"not the original either: {row[way]}"
    return row | {"seconds": f"{time.perf_counter() - start:.1f}", "versions": support_table.VERSIONS}


def attempt(run: Callable[[nn.Module, Tensor], str], model: nn.Module, x: Tensor) -> str:
    """Say what became of one way."""
    try:
        return run(model, x)
    except Exception as error:  # the table is where failures are to be seen
        return one_line(error)[:200]


def main() -> None:
    """Parse and go."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="models; the smallest of every file if none is named")
    parser.add_argument("--csv", type=Path, default=support_table.EXPORTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # deprecations inside the libraries' own models
    names = options.names or support_table.smallest(list(support_table.table().values()))
    done = {row["model"] for row in support_table.exported(options.csv)}
    for name in track([name for name in names if name not in done], description="export"):
        row, new = measure(name), not options.csv.exists()
        with options.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)


if __name__ == "__main__":
    main()
