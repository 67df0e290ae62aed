"""The support table: what becomes of every batch-norm network of torchvision and timm, with the proofs.

Every model is planned on the meta device, then converted from both starting points and verified on white noise, with
random statistics and affine parameters. A run can be stopped at any time and goes on where it was; several shards can
run side by side. `--render` merges what they measured into the table.

Run: python examples/support_table.py [--shard 0/2] [--work FOLDER] [NAME ...]
     python examples/support_table.py --render [--work FOLDER]
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from rich.progress import track
from torch import Tensor, nn
from unusual_inputs import verifier

import normfree
from normfree import zoo
from normfree.norms import describe, find_norms

TABLE = Path(__file__).parent / "results" / "support.csv"
PAGE = TABLE.with_suffix(".md")
STRUCTURE = ("norms", "fold", "affine", "residual", "parallel", "merge", "alphas", "declined", "opaque")
COLUMNS = ("model", "file", "parameters", *STRUCTURE, "why", "input", "status", "preserve_error", "batch_error")
COLUMNS += ("gradients", "seconds", "versions")
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
    model = build_on_meta(name)
    if not find_norms(model):
        return None
    plan = normfree.plan(model, init="preserve")
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
    }


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Give every norm statistics and an affine as training leaves them, some gains negative."""
    generator = torch.Generator().manual_seed(0)
    for name in find_norms(model):
        norm = describe(model.get_submodule(name))
        for tensor, low, high in (
            (norm.mean, -0.5, 0.5),
            (norm.var, 0.5, 2),
            (norm.weight, 0.5, 1.5),
            (norm.bias, -0.5, 0.5),
        ):
            if tensor is not None:
                value = low + (high - low) * torch.rand(tensor.shape, generator=generator)
                flip = (torch.rand(tensor.shape, generator=generator) < 0.25) & (tensor is norm.weight)
                tensor.copy_(torch.where(flip, -value, value))


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


def proofs(name: str) -> dict[str, Any]:
    """Convert from both starting points and verify."""
    start = time.perf_counter()
    model = zoo.build(zoo.find(name))
    row: dict[str, Any] = {"versions": VERSIONS}
    special = verifier(model)
    if special is not None:
        randomise(model)
        row |= special(model)
    else:
        row |= verified(model)
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def verified(model: nn.Module) -> dict[str, Any]:
    """All six proofs from both starting points, on the smallest input that fits."""
    inputs = fitting(model)
    randomise(model)
    row: dict[str, Any] = {"input": "x".join(map(str, inputs.shape))}
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


def read(work: Path) -> dict[str, dict[str, Any]]:
    """Rows measured so far: the table's, and those of the work folder, which are newer."""
    rows: dict[str, dict[str, Any]] = {}
    if TABLE.exists():
        with TABLE.open(newline="") as file:
            rows = {row["model"]: row for row in csv.DictReader(file)}
    for path in sorted(work.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            rows[row["model"]] = {column: str(row.get(column, "")) for column in COLUMNS}
    return rows


def run(wanted: Iterable[str], shard: str, work: Path) -> None:
    """Measure the models of one shard that the work folder does not hold yet, small ones first."""
    work.mkdir(parents=True, exist_ok=True)
    plans = plan_all(wanted, work / "plans.json")
    number, of = map(int, shard.split("/"))
    mine = sorted(plans.values(), key=lambda row: row["parameters"])[number::of]
    out = work / f"{number}of{of}.jsonl"
    done = {json.loads(line)["model"] for path in work.glob("*.jsonl") for line in path.read_text().splitlines()}
    for planned in track([row for row in mine if row["model"] not in done], description=f"shard {shard}"):
        with out.open("a") as file:
            file.write(json.dumps(measure(planned["model"], planned)) + "\n")


def plan_all(wanted: Iterable[str], cache: Path) -> dict[str, dict[str, Any]]:
    """Plan every model once, for all shards."""
    known = json.loads(cache.read_text()) if cache.exists() else {}
    for name in track([n for n in wanted if n not in known], description="plans"):
        known[name] = structure(name)
    cache.write_text(json.dumps(known))
    return {name: known[name] for name in wanted if known[name] is not None}


def render(work: Path) -> None:
    """Write the table and the page."""
    rows = sorted(read(work).values(), key=lambda row: (row["file"], row["model"]))
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
    yield f"{VERSIONS}."
    yield "Written by `python examples/support_table.py --render`; the figures are in `support.csv`.\n"
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


def main() -> None:
    """Parse and go."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="models; all of both libraries if none is named")
    parser.add_argument("--shard", default="0/1", help="which part of how many")
    parser.add_argument("--work", type=Path, default=Path("build/support"), help="where a run keeps its rows")
    parser.add_argument("--render", action="store_true", help="merge the rows into the table")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # deprecations inside the libraries' own models
    if options.render:
        render(options.work)
    else:
        run(options.names or names(), options.shard, options.work)


if __name__ == "__main__":
    main()
