"""The support table: what becomes of every batch-norm network of torchvision and timm, with the proofs.

Every model is planned on the meta device, then converted from both starting points and verified on white noise, with
random statistics and affine parameters, at the smallest size that they take or can be built for. A run can be stopped
at any time and goes on where it was; several shards can run side by side. What the table holds already is measured
again only if it is named or if `--again` says so; what the work folder holds is not, so start with an empty one after
a change. `--render` merges a run into the table.

Run: python examples/experiments/support_table.py [--again] [--shard 0/2] [--work FOLDER] [NAME ...]
     python examples/experiments/support_table.py --render [--work FOLDER]
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import re
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from rich.progress import track
from torch import Tensor, nn
from unusual_inputs import largest_error, verifier

import normfree
from normfree import zoo
from normfree.norms import find_norms
from normfree.tracing.inputs import tensors

TABLE = Path(__file__).parents[1] / "results" / "support.csv"
PAGE = TABLE.with_suffix(".md")
EXPORTS = TABLE.with_name("export.csv")
STRUCTURE = ("norms", "fold", "affine", "residual", "parallel", "merge", "alphas", "declined", "opaque")
COLUMNS = ("model", "file", "parameters", *STRUCTURE, "why", "plan_seconds", "input", "gains", "status")
COLUMNS += ("preserve_error", "batch_error", "gradients", "seconds", "versions", "proved")
USUAL = 100 * 10**6
"""Parameters of the largest network whose plan's time is summed up."""
LARGE = 224
"""Pixels of a side from which on a model is built for a smaller image, if it can be."""
VERSIONS = f"torch {torch.__version__.partition('+')[0]}, torchvision {torchvision.__version__.partition('+')[0]}, "
VERSIONS += f"timm {timm.__version__}"


def names() -> list[str]:
    """Every architecture that the two libraries list, with and without norms."""
    return [f"torchvision:{n}" for n in torchvision.models.list_models()] + [f"timm:{n}" for n in timm.list_models()]


def file_of(name: str) -> str:
    """The library file that defines a model."""
    source = zoo.find(name)
    entry: Any = timm.models.model_entrypoint if source.library == "timm" else torchvision.models.get_model_builder
    return str(entry(source.name).__module__).replace(".models", "", 1)


def build_on_meta(name: str) -> nn.Module:
    """Build without memory; what computes with its own weights while it is built needs the real device."""
    try:
        with torch.device("meta"):
            return zoo.build(zoo.find(name))
    except Exception:  # torchvision's regnets and whatever else reads a number from a tensor
        return zoo.build(zoo.find(name))


def structure(name: str) -> dict[str, Any] | None:
    """What the plan says about one model, or nothing if it holds no norm."""
    torch.manual_seed(0)  # how many boxes a detector finds, and adds to, is up to its weights
    model = build_on_meta(name)
    if not find_norms(model):
        return None
    start = time.process_time()
    plan = normfree.plan(model, init="preserve")
    seconds = time.process_time() - start
    actions, kinds = Counter(e.action for e in plan.norms), Counter(s.kind for s in plan.sums)
    reasons = [*plan.declined, *(f"{path or 'the root'} is not traced: {why}" for path, why in plan.opaque)]
    return {
        "model": name,
        "file": file_of(name),
        "parameters": sum(p.numel() for p in model.parameters()),
        "norms": len(plan.norms),
        **{action: actions[action] for action in ("fold", "affine")},
        **{kind: kinds[kind] for kind in ("residual", "parallel", "merge")},
        "alphas": len(plan.alphas),
        "declined": len(plan.declined),
        "opaque": len(plan.opaque),
        "why": "; ".join(dict.fromkeys(re.sub(r"\b\d+\b", "*", reason)[:160] for reason in reasons)),
        "plan_seconds": round(seconds, 2),
    }


def randomise(model: nn.Module, seed: int = 0, gains: float = 1.0) -> nn.Module:
    """Give every norm statistics and an affine as training leaves them, some gains negative; return ``model``.

    A norm as constructed is almost the identity in eval mode: whatever a conversion does with it passes. ``gains``
    is a factor on the gains.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: object, low: float, high: float, signs: bool = False) -> None:
        if isinstance(tensor, Tensor):
            value = low + (high - low) * torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            if signs:
                value = torch.where(torch.rand(tensor.shape, generator=generator) < 0.25, -value, value)
            tensor.copy_(value)

    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "running_mean"):
                draw(module.running_mean, -0.5, 0.5)
                draw(module.running_var, 0.5, 2.0)
                draw(module.weight, 0.5 * gains, 1.5 * gains, signs=True)
                draw(module.bias, -0.5, 0.5)
    return model


def settled(model: nn.Module, inputs: Tensor) -> float:
    """Randomise the norms so that the outputs mean something; return the factor on the gains.

    With gains around one, some hundred random layers may amplify rounding until nothing else is left: the original's
    own output in float32 has then nothing to do with the one in float64, and no two ways of computing it agree.
    """
    for factor in (1.0, 0.8, 0.65, 0.5):
        randomise(model, gains=factor).eval()
        with torch.no_grad():
            single = tensors(model(inputs.clone()))
            double = tensors(model.double()(inputs.double()))
        model.float()
        if largest_error(double, single) < 1e-3:
            return factor
    raise ValueError("the original amplifies rounding however small its gains are")


def sizes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Shapes of one sample, the smallest first; large models start at a smaller one."""
    first = next(m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))
    channels = getattr(model, "pretrained_cfg", {}).get("input_size", (first.in_channels,))[0]
    if isinstance(first, nn.Conv3d):
        yield from ((channels, *size) for size in ((4, 48, 48), (8, 64, 64), (16, 112, 112), (16, 224, 224)))
        return
    large = sum(p.numel() for p in model.parameters()) > 30e6
    for size in (*([32] if large else []), 64, 96, 128, 160, 192, 224, 240, 256, 288, 299, 320, 384, 448, 512):
        yield channels, size, size


def fitting(model: nn.Module) -> Tensor:
    """The smallest batch of two that the model takes in both modes."""
    errors = []
    for shape in sizes(model):
        inputs = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
        try:
            with torch.no_grad():
                for training in (True, False):
                    model.train(training)(inputs.clone())
        except Exception as error:  # whatever the model raises for a shape it does not take
            errors.append(f"{type(error).__name__}: {error}"[:100])
        else:
            return inputs
    raise ValueError(f"no size fits: {errors[-1]}")


def smaller(name: str) -> nn.Module | None:
    """Build the model for the smallest image its library allows, or nothing if that is no argument of it.

    Networks with windows or position tables take one size, and some a large one. Built for another they have the same
    layers under the same names, as the plans show, and smaller tables.
    """
    source = zoo.find(name)
    if source.library != "timm":
        return None
    fits = (size for size in (64, 96, 128, 160, 192) if runs_at(source.name, size))
    size = next(fits, None)
    return None if size is None else timm.create_model(source.name, img_size=size)


def runs_at(name: str, size: int) -> bool:
    """Whether a timm model can be built for a size, and is then the same network for it."""
    try:
        with torch.device("meta"), torch.no_grad():
            model = timm.create_model(name, img_size=size)
            model.eval()(torch.randn(2, 3, size, size))
    except Exception:  # no such argument, or a size that does not divide: whatever the model raises
        return False
    return decisions(model) == decisions(build_on_meta(f"timm:{name}"))


def decisions(model: nn.Module) -> list[tuple[str, ...]]:
    """What the plan does where."""
    plan = normfree.plan(model, init="preserve")
    return [(edit.name, edit.action) for edit in plan.norms] + [
        (total.name, total.kind, *(alpha.path for alpha in total.alphas)) for total in plan.sums
    ]


def proofs(name: str) -> dict[str, Any]:
    """Convert from both starting points and verify."""
    start = time.perf_counter()
    model = zoo.build(zoo.find(name))
    row: dict[str, Any] = {"versions": VERSIONS, "proved": datetime.date.today().isoformat()}
    special = verifier(model)
    if special is not None:
        randomise(model)
        row |= special(model)
    else:
        inputs, note = fitting(model), ""
        if inputs.shape[-1] >= LARGE and (rebuilt := smaller(name)) is not None:
            model, inputs = rebuilt, fitting(rebuilt)
            note = f", built for {inputs.shape[-1]} px"
        row |= verified(model, inputs)
        row["input"] += note
    return {"gains": 1.0} | row | {"seconds": round(time.perf_counter() - start, 1)}


def verified(model: nn.Module, inputs: Tensor) -> dict[str, Any]:
    """All six proofs from both starting points."""
    row: dict[str, Any] = {"input": "x".join(map(str, inputs.shape)), "gains": settled(model, inputs)}
    failed: list[str] = []
    for init in ("preserve", "skipinit"):
        report = normfree.verify(normfree.convert(model, init=init), model, inputs)
        failed += [f"{init} proof {p.number}: {p.detail}" for p in report.proofs if p.passed is False]
        figures = {p.number: p for p in report.proofs}
        if init == "preserve":
            row["preserve_error"] = f"{figures[3].figure:.1e}"
        else:
            row |= {"batch_error": f"{figures[2].figure:.1e}", "gradients": figures[5].detail.partition(" ")[0]}
    return row | {"status": "; ".join(failed) or "ok"}


def measure(name: str, planned: dict[str, Any]) -> dict[str, Any]:
    """One row of the table; a model that fails gets a row that says how."""
    try:
        return planned | proofs(name)
    except Exception as error:  # the table is where failures are to be seen
        return planned | {"status": f"{type(error).__name__}: {error}"[:300], "versions": VERSIONS}


def table() -> dict[str, dict[str, Any]]:
    """The committed table by model."""
    if not TABLE.exists():
        return {}
    with TABLE.open(newline="") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


def smallest(rows: list[dict[str, Any]]) -> list[str]:
    """The smallest verified model of every file."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        known = found.setdefault(row["file"], row) if row["status"] else None
        if known is not None and int(row["parameters"]) < int(known["parameters"]):
            found[row["file"]] = row
    return [str(row["model"]) for row in found.values()]


def measured(work: Path) -> dict[str, dict[str, Any]]:
    """The rows that the shards in a work folder have measured."""
    lines = (line for path in sorted(work.glob("*.jsonl")) for line in path.read_text().splitlines())
    return {row["model"]: row for row in map(json.loads, lines)}


def plans(work: Path) -> dict[str, dict[str, Any] | None]:
    """The plans made so far; `None` for what holds no norm."""
    path = work / "plans.json"
    found: dict[str, dict[str, Any] | None] = json.loads(path.read_text()) if path.exists() else {}
    return found


def run(wanted: list[str], known: set[str], shard: str, work: Path) -> None:
    """Plan everything, then measure one shard of what is not known yet, small models first."""
    work.mkdir(parents=True, exist_ok=True)
    planned = plans(work)
    for i, name in enumerate(track([n for n in wanted if n not in planned], description="plans")):
        planned[name] = structure(name)
        if i % 50 == 49:  # a stopped run loses no more than that
            (work / "plans.json").write_text(json.dumps(planned))
    (work / "plans.json").write_text(json.dumps(planned))
    number, of = map(int, shard.split("/"))
    rows = sorted((row for n in wanted if (row := planned[n]) is not None), key=lambda row: int(row["parameters"]))
    done = known | measured(work).keys()
    for row in track([row for row in rows[number::of] if row["model"] not in done], description=f"shard {shard}"):
        with (work / f"{number}of{of}.jsonl").open("a") as file:
            file.write(json.dumps(measure(row["model"], row)) + "\n")


def render(work: Path) -> None:
    """Write the table and the page: what is measured anew replaces a row, what is planned anew its structure."""
    merged = table()
    for row in [row for row in plans(work).values() if row is not None] + list(measured(work).values()):
        merged[row["model"]] = merged.get(row["model"], {}) | row
    text = [{column: str(row.get(column, "")) for column in COLUMNS} for row in merged.values()]
    rows = sorted(text, key=lambda row: (row["file"], row["model"]))
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    PAGE.write_text("\n".join(page(rows)) + "\n")


def page(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The table for people: a summary by file, then every model."""
    checked = [row for row in rows if row["status"]]
    good = [row for row in checked if row["status"] == "ok"]
    yield "# What converts\n"
    yield f"{len(rows)} networks with batch normalisation, all planned; {len(checked)} converted from both starting"
    yield f"points and verified on white noise with random statistics, {len(good)} of them with every proof."
    smaller = sum(row["gains"] not in ("", "1.0") for row in rows)
    yield f"In {smaller} the gains were drawn smaller: the original itself amplified rounding beyond use."
    days = Counter(row["proved"] for row in checked)
    yield (
        f"{VERSIONS}. Proved with what the package was on " + ", ".join(f"{d} ({days[d]})" for d in sorted(days)) + "."
    )
    yield from plan_times(rows)
    yield "Written by `python examples/experiments/support_table.py --render`; the figures are in `support.csv`.\n"
    yield "| file | models | verified | norms | residual | parallel | merge | alpha | declined |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for file in dict.fromkeys(row["file"] for row in rows):
        mine = [row for row in rows if row["file"] == file]
        ok = sum(row["status"] == "ok" for row in mine)
        sums = [
            sum(int(row[key]) for row in mine)
            for key in ("norms", "residual", "parallel", "merge", "alphas", "declined")
        ]
        yield f"| {file} | {len(mine)} | {ok} | " + " | ".join(map(str, sums)) + " |"
    yield "\n| model | norms | residual | parallel | merge | alpha | declined | preserve error | input | status | s |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    keys = ("model", "norms", "residual", "parallel", "merge", "alphas", "declined", "preserve_error", "input")
    for row in rows:
        status = (row["status"] or "planned only") + (f" ({row['why']})" if row["why"] else "")
        yield "| " + " | ".join(row[key] for key in keys) + f" | {status.replace('|', '/')} | {row['seconds']} |"
    yield from exports(exported(EXPORTS))


def plan_times(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What a plan takes, of the processor."""
    usual = [row for row in rows if row["plan_seconds"] and int(row["parameters"]) <= USUAL]
    seconds = sorted(float(row["plan_seconds"]) for row in usual)
    if not seconds:
        return
    median, most = statistics.median(seconds), seconds[int(0.9 * (len(seconds) - 1))]
    over = sum(value > 1 for value in seconds)
    yield f"`plan`, processor time, {len(seconds)} networks to {USUAL // 10**6} million parameters: median"
    yield f"{median:.2f} s, nine of ten within {most:.2f} s, {over} over 1 s, the slowest {seconds[-1]:.2f} s."


def exported(path: Path) -> list[dict[str, str]]:
    """What `export_table.py` has measured."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def exports(rows: list[dict[str, str]]) -> Iterator[str]:
    """The table of what leaves PyTorch, for people."""
    yield "\n# What leaves PyTorch\n"
    yield "The smallest verified network of every file, converted, fused, compared with its program on another batch"
    yield "(ONNX in onnxruntime, TorchScript scripted or else traced, `torch.compile` as one graph)."
    yield "Written by `python examples/experiments/export_table.py`; the figures are in `export.csv`.\n"
    yield "| file | model | input | pt2 | onnx | torchscript | compile |"
    yield "|---|---|---|---|---|---|---|"
    for row in sorted(rows, key=lambda row: row["file"]):
        cells = (row[key] for key in ("file", "model", "input", "pt2", "onnx", "torchscript", "compile"))
        yield "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def main() -> None:
    """Parse and go."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="models; all of both libraries if none is named")
    parser.add_argument("--shard", default="0/1", help="which part of how many")
    parser.add_argument("--work", type=Path, default=Path("build/support"), help="where a run keeps its rows")
    parser.add_argument("--again", action="store_true", help="measure what the table holds already, too")
    parser.add_argument("--render", action="store_true", help="merge the rows into the table")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # deprecations inside the libraries' own models
    if options.render:
        render(options.work)
    else:
        current = {name for name, row in table().items() if row["status"] == "ok" and row["versions"] == VERSIONS}
        known = set() if options.again or options.names else current
        run(options.names or names(), known, options.shard, options.work)


if __name__ == "__main__":
    main()
