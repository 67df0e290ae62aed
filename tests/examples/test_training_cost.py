"""What a training step keeps and dispatches: the committed figures, held at their present value."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
import training_cost
from marks import broad

from normfree import zoo
from normfree.bench import Setting, run
from normfree.bench.results import COLUMNS, flat

TABLE = Path(training_cost.__file__).parents[1] / "results" / "training_memory.csv"
ROWS = {(row["model"], row["init"], row["arm"]): row for row in training_cost.known(TABLE)}
MODELS = [f"torchvision:{name}" for name in training_cost.NAMES]


@pytest.mark.parametrize("init", ["skipinit", "preserve"])
@pytest.mark.parametrize("model", MODELS)
def test_table_shows_the_memory_of_the_bare_network(model: str, init: str) -> None:
    ours, bare, bn = (ROWS[model, init, arm] for arm in ("normfree", "bare", "bn"))
    # Counted with two images on a processor: layers with few places keep what alpha and gain multiply, and no weight.
    assert float(ours["saved_mib_per_image"]) <= 1.05 * float(bare["saved_mib_per_image"])
    assert float(ours["saved_mib_per_image"]) < 0.75 * float(bn["saved_mib_per_image"])
    constants = {"skipinit": 1.0, "preserve": 1.12}  # of the parameters: `preserve` has means of filters and gains too
    assert float(ours["saved_constant_mib"]) <= constants[init] * float(ours["parameters_mib"])
    assert int(bare["activation_operators"]) <= int(ours["activation_operators"])


@pytest.mark.parametrize(
    ("model", "init"),
    [
        ("torchvision:resnet18", "preserve"),
        ("torchvision:mobilenet_v2", "skipinit"),
        *broad(("torchvision:resnet18", "skipinit"), ("torchvision:mobilenet_v2", "preserve")),
    ],
)
def test_figures_are_what_the_table_says(model: str, init: Any) -> None:
    setting = Setting(batch=2, runs=0, init=init, arms=("normfree", "bare"))
    results = run(model, zoo.build(zoo.find(model)), setting)
    for result in results:
        found = {key: str(value) for key, value in flat(result, setting.about(model)).items()}
        row = ROWS[model, init, result.arm]
        held = ["saved_mib_per_image", "saved_constant_mib", "parameters_mib"]
        if row["versions"] == f"torch {torch.__version__.partition('+')[0]}":  # another one may decompose otherwise
            held += ["operators", "activation_operators"]
        assert {key: found[key] for key in held} == {key: row[key] for key in held}


def test_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "rows.csv"
    short = ["training_cost.py", "--runs", "0", "--size", "32", "--batch", "2", "--arms", "normfree,bare"]
    monkeypatch.setattr("sys.argv", [*short, "--csv", str(table), "timm:test_resnet"])
    training_cost.main()
    once = table.read_text()
    training_cost.main()
    assert table.read_text() == once
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    assert [(row["init"], row["arm"]) for row in rows] == [
        ("skipinit", "normfree"),
        ("skipinit", "bare"),
        ("preserve", "normfree"),
        ("preserve", "bare"),
    ]
