"""The house rules that a machine can hold: lint, format, types, file sizes, and what may be imported where."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import normfree

ROOT = Path(__file__).parent.parent
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


LAYERS = (
    "errors copying plain",
    "norms layers initialization roles",
    "calls asking proxies leaves",
    "tracer traces optim",
    "tracing",
    "graph",
    "activations decoders blocks",
    "sums",
    "tails sites",
    "analysis plans",
    "guards selecting observing originals inputs",
    "preparing",
    "placing kinds replaying holders",
    "deciding",
    "planning rewriting reference files zoo",
    "conversion fusing calibration",
    "restoring proofs",
    "checkpoint exporting",
    "bench verifying printing propagation",
    "cli",
)


def test_dependencies_point_downwards_only() -> None:
    level = {name: i for i, line in enumerate(LAYERS) for name in line.split()}
    for path in FILES:
        module = path.relative_to(ROOT / "normfree").with_suffix("").parts[0]
        if module in ("__init__", "__main__"):
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("normfree."):
                other = node.module.split(".")[1]
                assert other == module or level[other] < level[module], f"{module} imports {other}"
