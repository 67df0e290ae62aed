"""The README is the manual: every code block of it runs."""

from __future__ import annotations

import doctest
import os
import re
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
SHELL = [text for language, text in BLOCKS if language == "bash"]
DOCTESTS = [text for language, text in BLOCKS if language == "pycon"]
TEST_COMMAND = 'pip install ".[test]" && pytest'


def test_every_block_has_a_language_that_is_run() -> None:
    assert {language for language, _ in BLOCKS} <= {"python", "bash", "pycon", "text"}
    assert PYTHON
    assert SHELL
    assert TEST_COMMAND in "".join(SHELL)
    assert TEST_COMMAND in (ROOT / ".ci" / "run").read_text()


def test_accuracies_are_those_of_the_tables() -> None:
    pages = "".join(path.read_text() for path in (ROOT / "examples" / "results").glob("*.md"))
    figures = re.findall(r"\d+\.\d ± \d+\.\d \(2\^-?\d+\)", (ROOT / "README.md").read_text())
    assert len(figures) > 60
    assert [figure for figure in figures if figure not in pages] == []


@pytest.mark.filterwarnings("ignore:Secure RNG turned off")  # Opacus says so of every engine without torchcsprng
@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_blocks_run(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(PYTHON[number], f"README block {number}", "exec"), {"__name__": "readme"})  # noqa: S102


@pytest.mark.parametrize("number", range(len(DOCTESTS)))
def test_console_blocks_print_what_they_say(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    test = doctest.DocTestParser().get_doctest(DOCTESTS[number], {}, f"README block {number}", None, None)
    assert test.examples
    failures: list[str] = []
    doctest.DocTestRunner().run(test, out=failures.append)
    assert not failures, "".join(failures)


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment that sees this one's packages, so that torch is not downloaded once more."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=True)
    packages = next((folder / "lib").glob("python*")) / "site-packages"
    (packages / "outer.pth").write_text("\n".join(site.getsitepackages()))
    return folder


@pytest.mark.parametrize("number", range(len(SHELL)))
def test_shell_blocks_run(number: int, fresh: Path, tmp_path: Path) -> None:
    """In a copy of what git tracks, so that `pip install .` builds what a user gets."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(fresh / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
        # The test command would run this test again, and so for ever: here it installs and collects. CI runs it whole.
        "PYTEST_ADDOPTS": "--collect-only -q -n 0",
        "PYTHONPATH": "",
    }
    done = subprocess.run(
        ["bash", "-e", "-c", SHELL[number]], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_docstring_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = (
        "import doctest, importlib, pkgutil, sys, normfree\n"
        "names = [m.name for m in pkgutil.walk_packages(normfree.__path__, 'normfree.') if '__main__' not in m.name]\n"
        "results = [doctest.testmod(importlib.import_module(name)) for name in names]\n"
        "print(sum(r.attempted for r in results))\n"
        "sys.exit(sum(r.failed for r in results))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.splitlines()[-1]) >= 15
