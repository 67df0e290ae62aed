"""Scripts, and what they start, run in this process: importing torch takes longer than most of what they do."""

from __future__ import annotations

import contextlib
import importlib
import io
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from harness import ROOT
from typer.testing import CliRunner

from normfree.cli import app

EXAMPLES = ROOT / "examples"


def script(name: str) -> Path:
    """Find an example, or an experiment, by its name."""
    (path,) = EXAMPLES.rglob(Path(name).name)
    return path


@contextlib.contextmanager
def as_if_alone(*arguments: str) -> Iterator[io.StringIO]:
    """Start as in a process of its own: arguments, one thread, warnings that are no errors; catch what is printed."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as said,
        mock.patch.object(sys, "argv", list(arguments)),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        for state in (AcceleratorState, GradientState, PartialState):
            state._shared_state.clear()
        torch.set_num_threads(1)  # fixtures of a module come before what `conftest` does for a test
        yield said
    torch.set_num_threads(1)


def run_here(name: str, *arguments: object) -> str:
    """Call an example's ``main`` with these arguments and return what it prints."""
    with as_if_alone(str(script(name)), *map(str, arguments)) as said:
        importlib.import_module(Path(name).stem).main()
    return said.getvalue()


def run_process(name: str, *arguments: object) -> str:
    """Run an example as people do and return what it prints."""
    command = [sys.executable, str(script(name)), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def normfree(*arguments: str) -> str:
    """Run the command line and return what it prints."""
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.stdout


def started_here(command: list[str], **_options: Any) -> subprocess.CompletedProcess[str]:
    """Stand in for `subprocess.run` of Python on some code, or on the command line, that must succeed."""
    python, how, what, *arguments = command
    assert python == sys.executable
    if (how, what) == ("-m", "normfree"):
        return subprocess.CompletedProcess(command, 0, normfree(*arguments))
    assert how == "-c"
    with as_if_alone(how, *arguments) as said:
        exec(compile(what, "<what a script starts>", "exec"), {"__name__": "__main__"})  # noqa: S102
    return subprocess.CompletedProcess(command, 0, said.getvalue())
