"""What is printed where there is little room: every option on a line, and no name broken."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import timm
import typer
from typer.testing import CliRunner

import normfree
from normfree.cli import app
from normfree.cli.printing import Table

COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]  # of a group
SOURCE = "timm:test_resnet"


def printed(*arguments: object, columns: int, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": str(columns)})
    assert done.exit_code == code, done.output
    return done.output


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_takes_one_line(command: str) -> None:
    options = printed(command, "--help", columns=80).partition("Options:\n")[2].splitlines()
    assert len(options) > 3
    for line in options:
        assert re.match(r"  -\S+.*  \S", line), f"{line!r} goes on from the line before"
        assert len(line) <= 80


def test_every_command_takes_one_line() -> None:
    commands = printed("--help", columns=60).partition("Commands:\n")[2].splitlines()
    assert sorted(line.split()[0] for line in commands) == COMMANDS
    assert all(len(line) <= 60 and not line.endswith("...") for line in commands)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("narrow") / "a-rather-long-name-of-a-file.safetensors"
    assert CliRunner().invoke(app, ["convert", SOURCE, "-o", str(path), "--init", "preserve"]).exit_code == 0
    return path


def names() -> set[str]:
    plan = normfree.plan(timm.create_model("test_resnet"))
    return {edit.name for edit in plan.norms} | {total.name for total in plan.sums}


@pytest.mark.parametrize("columns", [20, 60, 100])
def test_no_name_is_broken(columns: int, file: Path, tmp_path: Path) -> None:
    plot, csv = tmp_path / "the-picture-of-the-signals.png", tmp_path / "the-rows-of-the-table.csv"
    small, counted = ("--batch", 2, "--size", 32), ("--runs", 0, "--arms", "bn,bare")
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "the-last-of-many-checkpoints.pth").write_bytes(b"no checkpoint")
    sums = {name for name in names() if name.endswith("add")}
    outputs = {
        "inspect": (printed("inspect", SOURCE, columns=columns), names()),
        "verify": (printed("verify", file, "--size", 32, columns=columns), {"batch-norm", "statistics"}),
        "signals": (printed("signals", SOURCE, *small, "--plot", plot, columns=columns), sums),
        "bench": (printed("bench", SOURCE, *small, *counted, "--csv", csv, columns=columns), {"bare", "MiB/image"}),
        "fuse": (printed("fuse", file, "-o", tmp_path / "f.safetensors", columns=columns), {"wrote"}),
        "restore": (printed("restore", file, "-o", tmp_path / "r.safetensors", columns=columns), {"wrote"}),
        "folder": (
            printed("convert", SOURCE, "-o", tmp_path / "out", "--checkpoint", checkpoints, columns=columns, code=1),
            {"the-last-of-many-checkpoints.pth", "FAILED"},
        ),
    }
    for command, (output, wanted) in outputs.items():
        assert not wanted - set(output.split()), f"{command} breaks {wanted - set(output.split())}"
    assert f"wrote {plot}" in outputs["signals"][0]
    assert f"wrote {csv}" in outputs["bench"][0]


def test_a_table_is_as_wide_as_it_is_told() -> None:
    table = Table("name", "what it is called", "why")
    table.add("one.two.three", "a name", "because it is so and so")
    table.add("four", "another-that-has-hyphens", "")
    assert [line for line, _ in table.lines(80)] == [
        "name           what it is called         why",
        "one.two.three  a name                    because it is so and so",
        "four           another-that-has-hyphens",
    ]
    folded = [line for line, _ in table.lines(55)]
    assert max(map(len, folded)) <= 55
    assert folded[1:3] == ["one.two.three  a name                    because it is", f"{'':41}so and so"]
    assert [line for line, _ in table.lines(32)] == [
        "one.two.three",
        "  what it is called  a name",
        "  why                because it",
        "                     is so and",
        "                     so",
        "four",
        "  what it is called  another-that-has-hyphens",
    ]


def test_what_a_terminal_would_obey_is_shown() -> None:
    table = Table("name")
    table.add("a\x1b[31mred")
    assert [line for line, _ in table.lines(80)] == ["name", "a\\x1b[31mred"]


def test_json_is_one_line_wherever() -> None:
    arguments = ["bench", SOURCE, "--runs", "0", "--arms", "bn", "--size", "32", "--json"]
    shown = CliRunner().invoke(app, arguments, env={"COLUMNS": "20"}).stdout
    assert json.loads(shown)["ok"]
    assert shown.count("\n") == 1


def test_a_summary_is_what_the_tables_add_up_to() -> None:
    whole = printed("inspect", SOURCE, columns=100)
    summary = printed("inspect", SOURCE, "--summary", columns=100)
    norms = list(normfree.norms.find_norms(timm.create_model("test_resnet")))
    assert all(name in whole for name in norms)
    assert not any(f" {name} " in summary for name in norms)
    assert summary.strip() in whole
    assert len(summary.splitlines()) < len(whole.splitlines()) / 2
