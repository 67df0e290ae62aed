"""The house rules that a machine can hold: lint, format, types, file sizes, and what may be imported where."""

from __future__ import annotations

import ast
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT

import normfree

FILES = sorted((ROOT / "normfree").rglob("*.py"))


@pytest.mark.parametrize(
    "command",
    [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)],
    ids=["lint", "format", "types"],
)
def test_clean(command: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_top_level_is_what_the_design_says() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {line.split("/")[0] for line in tracked.splitlines()}
    allowed = "normfree examples tests pyproject.toml README.md CHANGELOG.md LICENSE .gitignore .ci"
    assert top == set(allowed.split())


def test_every_room_of_the_package_has_tests_under_its_name() -> None:
    rooms = {path.name for path in (ROOT / "normfree").iterdir() if (path / "__init__.py").exists()}
    tests = list((ROOT / "tests").glob("*/test_*.py"))
    assert rooms <= {path.parent.name for path in tests}
    assert len({path.name for path in tests}) == len(tests), "pytest imports test files by their names alone"


def test_every_room_says_first_what_comes_in_and_what_goes_out() -> None:
    first = {
        path.parent.name: ast.get_docstring(ast.parse(path.read_text()))
        for path in FILES
        if path.match("*/*/__init__.py")
    }
    first.pop("normfree")  # the package itself begins with an index
    said = re.compile(r"\bin[,;: ].*\bout\b|\bin; out (go|goes) ")
    assert [room for room, text in first.items() if not said.search((text or "").splitlines()[0])] == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_small_and_quiet(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 250
    tree = ast.parse(text)
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree)), "raise an error that says where"
    calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert "print" not in calls, "the command line writes, and nothing else does"
    assert ast.get_docstring(tree), "a module says why it is there"


def test_types_of_the_public_names_stand_beside_them() -> None:
    stub = ast.parse((ROOT / "normfree" / "__init__.pyi").read_text())
    typed = {
        (node.module, alias.name) for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    homes = {(f"normfree.{module}", name) for module, names in normfree._HOMES.items() for name in names}
    assert typed == homes | {("normfree", "errors")}
    assert sorted(normfree.__all__) == sorted(name for _, name in typed)
    assert all(getattr(normfree, name) is not None for name in normfree.__all__)


FLOORS = (
    "errors",
    "tracing.copying tracing.shapes files",
    "norms layers training.initialization rewriting.changing tracing.roles tracing.inputs tracing.randomness",
    "tracing.leaves tracing.traces options code.functions code.held",
    "tracing.notes analysis.joining code.text",
    "tracing.recorder code.weights code.settings rewriting.rows",
    "tracing.running rewriting.symbols rewriting.pairing",
    "tracing.trace analysis.flow",
    "analysis.activations analysis.additions analysis.decoders analysis.passing analysis.writing",
    "rewriting.blocks rewriting.hints",
    "analysis.sums analysis.moments",
    "analysis.tails analysis.sites",
    "analysis.findings edits",
    "plans planning.hooks",
    "planning.guards proofs.observing rewriting.originals rewriting.units training.centring",
    "rewriting.preparing training.watching training.optim",
    "planning.placing planning.classes proofs.replaying rewriting.optimizers",
    "planning.deciding",
    "planning.plan rewriting.applying zoo",
    "rewriting.comparing",
    "proofs.reference",
    "checkpoint.header",
    "conversion deployment.absorbing deployment.plain deployment.alone training.calibration",
    "deployment.merging",
    "deployment.fuse",
    "deployment.restore proofs",
    "checkpoint deployment.export",
    "bench proofs.verify training.drawing training.signals",
    "cli",
)
"""What may import what: a file imports from the floors above it in this list. A folder stands for all of its files that
are not named."""


def _floor(module: str) -> int:
    level = {name: i for i, line in enumerate(FLOORS) for name in line.split()}
    return level.get(".".join(module.split(".")[:2]), level.get(module.split(".")[0], -1))


def test_dependencies_point_downwards_only() -> None:
    for path in FILES:
        module = ".".join(path.relative_to(ROOT / "normfree").with_suffix("").parts)
        if module in ("__init__", "__main__"):
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("normfree."):
                other = node.module.removeprefix("normfree.")
                same = module.split(".")[0] == other.split(".")[0] and _floor(other) == _floor(module)
                assert _floor(other) > -1, f"{other} has no floor"
                assert same or _floor(other) < _floor(module), f"{module} imports {other}"


def test_the_docstring_of_the_package_is_an_index() -> None:
    text = normfree.__doc__ or ""
    assert [name for name in normfree.__all__ if not re.search(rf"^    (\w+, )*{name}\b", text, re.MULTILINE)] == []
    shown = pydoc.render_doc(normfree, renderer=pydoc.plaintext)
    assert "PACKAGE CONTENTS" not in shown.partition("six proofs of a conversion")[0], "the index comes first"
