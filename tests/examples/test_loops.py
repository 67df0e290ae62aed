"""The loops that people copy reach, in a few steps on real images, what they must reach; no warning is an error less."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

# Each is named here for test_examples.py: "finetune_plain.py", "finetune_lightning.py", "finetune_transformers.py".


@pytest.fixture
def accuracy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Call an example's ``main`` with these arguments and return the last accuracy that it prints."""

    def run(name: str, *arguments: object) -> float:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        for state in (AcceleratorState, GradientState, PartialState):  # as in a process of its own
            state._shared_state.clear()
        importlib.import_module(Path(name).stem).main()
        return float(re.findall(r"([0-9.]+)%", capsys.readouterr().out)[-1])

    return run


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_plain(accuracy, optimizer: str) -> None:
    assert accuracy("finetune_plain.py", "--optimizer", optimizer, "--epochs", 1) > 95


def test_lightning(accuracy) -> None:
    assert accuracy("finetune_lightning.py", "--epochs", 1) > 95


def test_transformers(accuracy, tmp_path: Path) -> None:
    assert accuracy("finetune_transformers.py", "--out", tmp_path) > 93
