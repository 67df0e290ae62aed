"""The README is the manual: every code block of it runs."""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import re
import shlex
import site
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import finetune_timm
import images
import labelled
import pytest
import scripts
from accelerate.commands.launch import launch_command_parser
from harness import ROOT

import normfree

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
@pytest.mark.filterwarnings("ignore::normfree.checkpoint.checking.SaveWarning")  # of models that no zoo knows
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


def commands(block: str) -> list[list[str]]:
    """The words of every command of a shell block."""
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(part) for line in lines for part in line.split("&&")]


ELSEWHERE = [["pytest"], ["python", "examples/quickstart.py"]]
"""What runs this, and what `test_examples.py` runs just so."""


def run_here(program: str, *words: str) -> None:
    """Do in this process what a shell would start; what needs others is held to what it may be asked."""
    if [program, *words] in ELSEWHERE:
        return
    if program == "normfree":
        scripts.normfree(*words)
    elif program == "python":
        scripts.run_here(Path(words[0]).name, *words[1:])
    elif program == "accelerate":
        assert words[0] == "launch"
        launched = launch_command_parser().parse_args(words[1:])
        with scripts.as_if_alone(*map(str, (launched.training_script, *launched.training_script_args))):
            assert finetune_timm.parse().cpu
    elif program == "pip":
        extras = re.findall(r"\w+", words[-1])
        assert (words[0], words[-1][0]) == ("install", ".")
        assert set(extras) <= set(metadata.metadata("normfree").get_all("Provides-Extra"))
    else:
        pytest.fail(f"{program} is not known here")


@pytest.mark.parametrize("number", range(len(SHELL)))
def test_shell_blocks_run_here(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(labelled, "photographs", lambda: tuple(part[::16] for part in images.photographs()))
    asked = commands(SHELL[number])
    for words in asked:
        run_here(*words)
    written = {path.name for path in tmp_path.rglob("*.*")}
    for words in asked:
        for option in {"-o", "--plot"} & set(words):
            assert words[words.index(option) + 1] in written


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment that sees this one's packages, so that torch is not downloaded once more."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=True)
    packages = next((folder / "lib").glob("python*")) / "site-packages"
    (packages / "outer.pth").write_text("\n".join(site.getsitepackages()))
    return folder


@pytest.mark.broad
@pytest.mark.parametrize("number", range(len(SHELL)))
def test_shell_blocks_run_in_a_fresh_environment(number: int, fresh: Path, tmp_path: Path) -> None:
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
    names = [m.name for m in pkgutil.walk_packages(normfree.__path__, "normfree.") if "__main__" not in m.name]
    results = {name: doctest.testmod(importlib.import_module(name)) for name in names}
    assert {name: result.failed for name, result in results.items() if result.failed} == {}
    assert sum(result.attempted for result in results.values()) >= 15
