"""The loops that people copy reach what they must, in a few steps on real images, and warn of nothing."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

Accuracy = Callable[..., float]
"""Runs an example with arguments, and returns the last percentage that it prints."""


@pytest.fixture
def accuracy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Accuracy:
    def run(name: str, *arguments: object) -> float:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        for state in (AcceleratorState, GradientState, PartialState):  # as in a process of its own
            state._shared_state.clear()
        importlib.import_module(Path(name).stem).main()
        torch.set_num_threads(1)
        return float(re.findall(r"([0-9.]+)%", capsys.readouterr().out)[-1])

    return run


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_plain_loop_at_a_batch_of_two(optimizer: str, accuracy: Accuracy) -> None:
    assert accuracy("finetune_plain.py", "--optimizer", optimizer, "--epochs", 1) > 93


# Lightning 2.6.6 makes a LeafSpec of torch's, which torch 2.14 no longer likes; and of 96 images nobody needs workers.
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated, use `isinstance:FutureWarning")
@pytest.mark.filterwarnings(r"ignore:The '(train|test)_dataloader' does not have many workers which may be")
def test_lightning_at_a_batch_of_two(accuracy: Accuracy) -> None:
    assert accuracy("finetune_lightning.py", "--epochs", 1) > 93


def test_transformers_at_a_batch_of_two(accuracy: Accuracy, tmp_path: Path) -> None:
    assert accuracy("finetune_transformers.py", "--out", tmp_path) > 94

    import finetune_transformers as example

    model = example.ResNetForImageClassification.from_pretrained(tmp_path).eval()
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    images, _ = example.digits(6, 9, 300)
    x, y = (torch.stack([image[key] for image in images]) for key in ("pixel_values", "labels"))
    with torch.no_grad():
        assert (model(x).logits.argmax(1) == y).float().mean() > 0.94, "what has its norms again computes the same"
