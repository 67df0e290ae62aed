"""Every example runs as people run it."""

from __future__ import annotations

import ast
import csv
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import convert_files
import images
import import_time
import pytest
import quickstart
import torch
import train_from_scratch
from marks import broad
from PIL import Image
from scripts import EXAMPLES, run_here, run_process, started_here

Run = Callable[..., str]
"""Runs an example with arguments, and returns what it prints."""


@pytest.fixture(params=["here", *broad("process")])
def run(request: pytest.FixtureRequest) -> Run:
    return run_here if request.param == "here" else run_process


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """What an example starts runs in this process too, where the example does."""
    if request.getfixturevalue("run") is run_here:
        for module in (quickstart, convert_files):
            monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=started_here))


@pytest.mark.usefixtures("together")
def test_quickstart_sees_the_same_on_real_photographs(run: Run, tmp_path: Path) -> None:
    out = run("quickstart.py", tmp_path)
    assert out.count("espresso 94.4%") == 2
    assert "Egyptian cat" in out
    differences = [float(text) for text in re.findall(r"largest difference[^:0-9]*:? ([0-9.e+-]+)", out)]
    assert len(differences) == 2
    assert max(differences) < 1e-4
    assert "all three top-5 lists agree" in out
    assert (tmp_path / "lite0-nf.safetensors").stat().st_size > 10_000_000


# "finetune_timm.py" is run by test_finetuning.py. "lite.py" is what finetune_table.py trains.
# "draw_signals.py" and "write_api.py" are run by test_readme.py.
# "finetune_plain.py", "finetune_lightning.py" and "finetune_transformers.py" are run by test_loops.py.
# "finetuning_forms.py" with "nine_blocks.py" is run by test_finetuning_forms.py.
# "other_libraries.py" is run by hand: the libraries that it is about are no dependencies.
def test_every_example_is_tested() -> None:
    text = Path(__file__).read_text()
    scripts = [path.name for path in EXAMPLES.rglob("*.py")]
    assert scripts
    assert [name for name in scripts if f'"{name}"' not in text] == []


def test_scripts_that_people_copy_stand_alone() -> None:
    """What they import is installed: no script beside them, and nothing of the experiments."""
    ours = {path.stem for path in EXAMPLES.rglob("*.py")}
    for path in EXAMPLES.glob("*.py"):
        nodes = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert not ours & names, path.name
        assert len(path.read_text().splitlines()) <= 260, path.name


def test_convert_time_writes_its_table(run: Run, tmp_path: Path) -> None:
    out = run("convert_time.py", "timm:test_resnet", "--runs", 1, "--csv", tmp_path / "times.csv")
    assert "timm:test_resnet" in out
    header, row = (tmp_path / "times.csv").read_text().splitlines()
    assert header.startswith("model,runs,preserve_ms")
    assert all(float(cell) > 0 for cell in row.split(",")[1:])


@pytest.mark.usefixtures("together")
def test_convert_files_measures_and_cleans_up(run: Run, tmp_path: Path) -> None:
    short = ("--endings", ".safetensors", ".pth", "--runs", 1, "--csv", tmp_path / "files.csv", "--work", tmp_path)
    # What a process needs beside the tensors is some 50 MiB: a small network would tell nothing of its memory.
    run("convert_files.py", "timm:resnet10t" if run is run_here else "torchvision:resnet50", *short)
    header, *rows = (tmp_path / "files.csv").read_text().splitlines()
    assert [row.split(",")[1] for row in rows] == [".safetensors", ".pth"]
    shares = [float(row.split(",")[header.split(",").index("peak_share")]) for row in rows]
    assert run is run_here or max(shares) < 2, "the tensors stand in memory twice"
    assert [path.name for path in tmp_path.iterdir()] == ["files.csv"]


def test_support_table_goes_on_where_it_was(run: Run, tmp_path: Path) -> None:
    names = ("timm:test_resnet", "timm:test_vit")
    for _ in range(2):
        run("support_table.py", *names, "--work", tmp_path)
    rows = (tmp_path / "0of1.jsonl").read_text().splitlines()
    assert len(rows) == 1, "one holds norms, and is measured once"
    row = json.loads(rows[0])
    assert (row["model"], row["status"], row["residual"], row["alphas"]) == ("timm:test_resnet", "ok", 4, 4)


def test_support_table_measures_detectors(run: Run, tmp_path: Path) -> None:
    run("support_table.py", "torchvision:ssdlite320_mobilenet_v3_large", "--work", tmp_path)  # by "unusual_inputs.py"
    row = json.loads((tmp_path / "0of1.jsonl").read_text())
    assert (row["status"], row["input"]) == ("ok", "2x3x96x96")
    assert float(row["preserve_error"]) <= 1e-9


def test_export_table_tells_ways_apart(run: Run, tmp_path: Path) -> None:
    table = tmp_path / "export.csv"
    for _ in range(2):
        run("export_table.py", "timm:test_efficientnet", "torchvision:ssdlite320_mobilenet_v3_large", "--csv", table)
    small, detector = csv.DictReader(table.read_text().splitlines())
    assert [small[way] for way in ("pt2", "onnx", "torchscript", "compile")] == ["ok", "ok", "ok", "ok"]
    assert detector["pt2"] == "not tried: takes more than one tensor"


def test_training_profile_finds_what_only_one_arm_does(run: Run, tmp_path: Path) -> None:
    table = tmp_path / "profile.csv"
    run("training_profile.py", "timm:test_resnet", "--size", 32, "--batch", 2, "--csv", table)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    arms = {row["arm"] for row in rows if "batch_norm" in row["kernel"]}
    assert arms == {"bn"}
    assert {row["arm"] for row in rows if "convolution" in row["kernel"]} == {"bn", "normfree", "biases", "bare"}


def test_training_cost_counts_without_a_clock(run: Run, tmp_path: Path) -> None:
    short = ("--runs", 0, "--size", 32, "--batch", 2, "--arms", "normfree,bare", "--csv", tmp_path / "rows.csv")
    run("training_cost.py", "timm:test_resnet", *short)
    header, *rows = (tmp_path / "rows.csv").read_text().splitlines()
    saved = [row.split(",")[header.split(",").index("saved_mib_per_image")] for row in rows]
    assert len(saved) == 4, "two arms from two starting points"
    assert saved[1] == saved[3], "bare, whatever the starting point"
    assert all(float(saved[1]) <= float(ours) < 1.3 * float(saved[1]) for ours in (saved[0], saved[2]))


def _grows_once(run: Run, tmp_path: Path, name: str, runs: int, *arguments: object) -> list[str]:
    """Run a script on "experiment.py", "images.py" and "drawing.py" twice; the second time it does nothing."""
    table = tmp_path / "table.csv"
    said = []
    for _ in range(2):
        run(name, *arguments, "--csv", table)
        said.append(table.read_text())
    assert said[0] == said[1]
    lines = said[0].splitlines()
    assert lines[0].endswith(",validation,test,seconds,curve,status")
    assert len(lines) == 1 + runs
    return lines[1:]


def test_find_recipe_writes_its_page(run: Run, tmp_path: Path) -> None:
    names = ("bn", "nothing")  # trained by "recipe.py"
    lines = _grows_once(run, tmp_path, "find_recipe.py", 8, *names, "--rates", 0.125, 65536, "--epochs", 1)
    assert [line.rpartition(",")[2] for line in lines if ",nothing," in line] == ["trained", "diverged"] * 2
    run("find_recipe.py", "--render", "--csv", tmp_path / "table.csv")
    assert (tmp_path / "table.md").read_text().count("| nothing | 1 |") == 2


def test_trainable_depth_writes_its_page_and_its_plot(run: Run, tmp_path: Path) -> None:
    short = ("--depths", 8, "--arms", "bn", "skipinit", "sqrt2", "--rates", 0.125, "--seeds", 2, "--epochs", 1)
    lines = _grows_once(run, tmp_path, "trainable_depth.py", 12, *short)
    assert {line.rpartition(",")[2] for line in lines} == {"trained"}
    said = run("trainable_depth.py", *short, "--csv", tmp_path / "table.csv")  # nothing is left to run
    assert "| SkipInit, alpha = 0 |" in said
    run("trainable_depth.py", "--render", "--csv", tmp_path / "table.csv")
    page = (tmp_path / "table.md").read_text()
    assert len(re.findall(r"\| SkipInit, alpha = 0 \| [0-9.]+ ± [0-9.]+ \(2\^-3\) \|", page)) == 2
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_trainable_depth_takes_a_folder_of_images(run: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    for i in range(80):
        path = tmp_path / "images" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = torch.randint(0, 100, (24, 24, 3), dtype=torch.uint8) + 100 * (i % 2)
        Image.fromarray(noise.numpy()).save(path)
    pictures = ("--images", tmp_path / "images", "--size", 8, "--batch", 8)
    short = ("--depths", 8, "--arms", "bn", "--rates", 0.125, "--seeds", 1, "--epochs", 4)
    lines = _grows_once(run, tmp_path, "trainable_depth.py", 2, *pictures, *short)
    assert [float(line.split(",")[8]) for line in lines] == [1.0, 1.0], "dark and bright images are told apart"


def test_learning_rate_regimes_writes_its_page_and_its_plot(run: Run, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    short = ("--batches", 32, 512, "--rates", 0.125, "--seeds", 1, "--epochs", 1, "--csv", table)
    run("learning_rate_regimes.py", *short, "--workers", 1 if run is run_here else 2)
    rows = [line.split(",") for line in table.read_text().splitlines()[1:]]
    assert sorted((row[2], row[4]) for row in rows) == [(a, b) for a in ("bn", "skipinit") for b in ("32", "512")]
    run("learning_rate_regimes.py", "--render", "--csv", table)
    assert table.with_suffix(".md").read_text().count("(2^-3)") == 4
    assert table.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_train_from_scratch_on_photographs(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if run is run_here:  # every eighth photograph will do
        pixels, defective = images.photographs()
        monkeypatch.setattr(images, "photographs", lambda: (pixels[::8], defective[::8]))
        monkeypatch.setattr(train_from_scratch, "images", functools.cache(images.solar_cells))
    short = ("--networks", "timm:test_resnet", "--size", 32, "--rates", 0.03125, "--seeds", 1, "--epochs", 1)
    lines = _grows_once(run, tmp_path, "train_from_scratch.py", 3, *short)
    assert all(0.5 < float(line.split(",")[8]) < 0.9 for line in lines), "the larger class is 69 %"
    said = run("train_from_scratch.py", *short, "--csv", tmp_path / "table.csv")  # nothing is left to run
    assert "| timm:test_resnet | 32 | 1 |" in said
    run("train_from_scratch.py", "--render", "--csv", tmp_path / "table.csv")
    assert "| timm:test_resnet | 32 | 1 |" in (tmp_path / "table.md").read_text()


def _pictures(folder: Path) -> Path:
    """Two classes of 20 pictures of noise each, dark and bright."""
    draw = torch.Generator().manual_seed(0)
    for i in range(40):
        path = folder / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = torch.randint(0, 100, (64, 64, 3), dtype=torch.uint8, generator=draw) + 100 * (i % 2)
        Image.fromarray(noise.numpy()).save(path)
    return folder


def test_finetune_table_goes_on_and_writes_its_page_and_its_plot(run: Run, tmp_path: Path) -> None:
    pictures = ("--images", _pictures(tmp_path / "images"), "--size", 64, "--model", "test_efficientnet")
    short = ("--batches", 12, 1, "--rates", 0.0625, 2.0**100, "--seeds", 2, "--epochs", 1)
    lines = _grows_once(run, tmp_path, "finetune_table.py", 24, *pictures, *short)  # by "arms.py", "steps.py"
    cells = [line.split(",") for line in lines]
    assert {(cell[1], cell[3]) for cell in cells if cell[3] == "1"} == {("bn", "1"), ("preserve", "1")}
    assert len({cell[1] for cell in cells}) == 6
    memory = {cell[1]: float(cell[9]) for cell in cells if cell[3] == "12"}
    assert memory["folded"] <= memory["preserve"] < memory["bn"]
    diverged = [cell for cell in cells if cell[-1] == "diverged"]
    assert {float(cell[6]) for cell in diverged} == {2.0**100}
    assert len(diverged) >= 6
    run("finetune_table.py", "--render", "--csv", tmp_path / "table.csv")
    page = (tmp_path / "table.md").read_text()
    assert len(re.findall(r"\| normfree \| [0-9.]+ ± [0-9.]+ \(2\^-4\) \| [0-9.]+ ± [0-9.]+ \(2\^-4\) \|", page)) == 1
    assert "| batch norm | 2^-4 .. 2^-4 | 2^-4 .. 2^-4 |" in page
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")


def test_import_time_is_a_difference(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if run is run_here:  # processes are what it measures: they get figures instead, a command its own
        seconds = {tuple(command): 1 + i / 4 for i, command in enumerate(import_time.COMMANDS.values())}
        monkeypatch.setattr(import_time, "run", lambda command: (seconds[tuple(command)], 2 * seconds[tuple(command)]))
    run("import_time.py", "--runs", 1, "--csv", tmp_path / "times.csv")
    lines = [line.rsplit(",", 6) for line in (tmp_path / "times.csv").read_text().splitlines()]
    assert [line[0].strip('"') for line in lines[1:]] == [
        "import torch",
        "import torch, normfree",
        "import torch, all of normfree",
        "normfree --help",
    ]
    for wall, more in ((2, 4), (3, 5)):  # on the clock, and of the processor
        whole, beyond = ([float(line[column]) for line in lines[1:]] for column in (wall, more))
        assert all(abs(value - whole[0] - each) < 0.003 for value, each in zip(whole, beyond, strict=True))
        assert run is not run_here or beyond == [(wall - 1) * i / 4 for i in range(4)]
