"""Every example runs as people run it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def _run(name: str, *arguments: object) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_quickstart_sees_the_same_on_real_photographs(tmp_path: Path) -> None:
    out = _run("quickstart.py", tmp_path)
    assert out.count("espresso 94.4%") == 2
    assert "Egyptian cat" in out
    differences = [float(text) for text in re.findall(r"largest difference[^:0-9]*:? ([0-9.e+-]+)", out)]
    assert len(differences) == 2
    assert max(differences) < 1e-4
    assert "all three top-5 lists agree" in out
    assert (tmp_path / "lite0-nf.safetensors").stat().st_size > 10_000_000


def test_every_example_is_tested() -> None:
    text = Path(__file__).read_text()
    scripts = [path.name for path in EXAMPLES.glob("*.py")]
    assert scripts
    assert [name for name in scripts if f'"{name}"' not in text] == []


def test_convert_time_writes_its_table(tmp_path: Path) -> None:
    out = _run("convert_time.py", "torchvision:resnet18", "--runs", 1, "--csv", tmp_path / "times.csv")
    assert "torchvision:resnet18" in out
    header, row = (tmp_path / "times.csv").read_text().splitlines()
    assert header.startswith("model,runs,preserve_ms")
    assert all(float(cell) > 0 for cell in row.split(",")[1:])


def test_support_table_goes_on_where_it_was(tmp_path: Path) -> None:
    names = ("timm:test_resnet", "timm:test_vit")
    for _ in range(2):
        _run("support_table.py", *names, "--work", tmp_path)
    rows = (tmp_path / "0of1.jsonl").read_text().splitlines()
    assert len(rows) == 1, "one holds norms, and is measured once"
    row = json.loads(rows[0])
    assert (row["model"], row["status"], row["residual"], row["alphas"]) == ("timm:test_resnet", "ok", 4, 4)


def test_support_table_measures_detectors(tmp_path: Path) -> None:
    _run("support_table.py", "torchvision:ssdlite320_mobilenet_v3_large", "--work", tmp_path)  # by "unusual_inputs.py"
    row = json.loads((tmp_path / "0of1.jsonl").read_text())
    assert (row["status"], row["input"]) == ("ok", "2x3x96x96")
    assert float(row["preserve_error"]) <= 1e-9


def test_training_cost_counts_without_a_clock(tmp_path: Path) -> None:
    short = ("--runs", 0, "--size", 32, "--batch", 2, "--arms", "normfree,bare", "--csv", tmp_path / "rows.csv")
    _run("training_cost.py", "torchvision:resnet18", *short)
    header, *rows = (tmp_path / "rows.csv").read_text().splitlines()
    saved = [row.split(",")[header.split(",").index("saved_mib_per_image")] for row in rows]
    assert len(saved) == 4, "two arms from two starting points"
    assert len(set(saved)) == 1
