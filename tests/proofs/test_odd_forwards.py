"""Forwards that draw, forget, mix or want labels: what a proof says of them, and what it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from harness import Block, Stem, both, noise, randomise
from torch import Tensor, nn
from typer.testing import CliRunner

import normfree
from normfree.cli import app
from normfree.errors import UsageError

X = noise(4, 3, 6, 6)
pytestmark = pytest.mark.filterwarnings("ignore::normfree.checkpoint.saving.SaveWarning")


class Divides(Stem):
    """By noise of its own: where all draws are zero that is infinite."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return y / torch.randn_like(y)


def test_a_model_that_divides_by_its_own_noise_is_compared() -> None:
    model = randomise(Divides())
    converted = normfree.convert(model, init="preserve", inputs=X)
    report = normfree.verify(converted, model, X)
    assert report.ok, str(report)
    figure = report.proofs[2].figure
    assert figure is not None
    assert figure < 1e-9
    with torch.no_grad():
        converted.bn.bias.add_(0.01)
    assert normfree.verify(converted, model, X).proofs[2].passed is False


class Mixes(Stem):
    """Returns rows and, in train mode only, a loss over the batch, as an autoencoder beside a classifier does."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.stem(x)
        return (y.mean((2, 3)), y.square().mean()) if self.training else y.mean((2, 3))


@both
def test_a_loss_that_mixes_in_train_mode_only_is_noticed_and_the_rows_are_proved(init: str) -> None:
    model = randomise(Mixes())
    converted = normfree.convert(model, init=init, inputs=X)
    proof = normfree.verify(converted, model, X).proofs[1]
    assert proof.passed
    assert "the original with its norms frozen mixes the samples too in 1 of 2 outputs" in proof.detail
    alone = normfree.verify(converted, None, X).proofs[1]
    assert alone.passed is False, "without the original nobody can say that it was not the conversion"
    forward = type(converted).forward

    class Worse(type(converted)):  # type: ignore[misc]  # a class that is not known before
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            rows, loss = forward(self, x)
            return rows + rows.mean(0), loss

    converted.__class__ = Worse
    converted.train()
    assert normfree.verify(converted.train(), model, X).proofs[1].passed is False


class Forgets(Stem):
    """Counts its calls, so that two identical ones differ."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = [0.0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1.0
        return self.stem(x) * self.calls[0]


@both
def test_a_model_whose_identical_calls_differ_is_said_to(init: str) -> None:
    model = randomise(Forgets())
    converted = normfree.convert(model, init=init, inputs=X, check=False)
    report = normfree.verify(converted, model, X)
    proof = report.proofs[1]
    assert proof.passed is None, "so it was before: nothing is claimed"
    assert report.ok, "compared are calls of the same number"
    assert proof.detail.startswith("two identical calls differ by ")
    steady = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    changed = normfree.convert(steady, init=init, inputs=X)
    changed.append(Scales())
    found = normfree.verify(changed, steady, X).proofs[1]
    assert found.passed is False, "the original was steady"
    assert found.detail.startswith("two identical calls differ by ")


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = [0.0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1.0
        return x * self.calls[0]


class WantsLabels(Stem):
    """Returns its loss while it learns, and asks for what it needs for that."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        y = self.stem(x).mean((2, 3))
        if not self.training:
            return y
        if labels is None:
            raise ValueError("labels should not be none when in training mode")
        return nn.functional.cross_entropy(y, labels, reduction="none")


@both
def test_a_model_that_wants_labels_in_train_mode_says_that_inputs_are_missing(init: str) -> None:
    model = randomise(WantsLabels())
    given = {"x": X, "labels": torch.arange(4)}
    converted = normfree.convert(model, init=init, inputs=given)
    with pytest.raises(
        UsageError, match=r"does not run in train mode \(it raises ValueError: labels .*\): give inputs="
    ):
        normfree.verify(converted, model, X)
    report = normfree.verify(converted, model, given)
    assert report.ok, str(report)


class Dead(nn.Module):
    """Behind a ReLU that never opens: nothing learns there, with or without norms."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.live = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.live(x) + torch.relu(self.block(x) - 1e6)


@both
def test_an_alpha_of_a_branch_that_learnt_nothing_before_is_not_blamed(init: str) -> None:
    model, x = randomise(Dead()), noise(4, 4, 6, 6)
    converted = normfree.convert(model, init=init, inputs=x)
    proof = normfree.verify(converted, model, x).proofs[4]
    assert proof.passed, proof
    assert "and nothing did in the original" in proof.detail
    alone = normfree.verify(converted, None, x).proofs[4]
    assert alone.passed is False, "without the original it may be the conversion's doing"


def test_fused_without_its_original_is_not_said_to_be_ok(tmp_path: Path) -> None:
    fused = normfree.fuse(normfree.convert(timm.create_model("test_resnet", num_classes=3), init="preserve"))
    report = normfree.verify(fused, None, noise(2, 3, 32, 32))
    assert (report.proofs[2].passed, report.proofs[2].missing) == (None, True)
    assert "3 not made" in str(report)
    assert json.loads(report.to_json())["ok"] is None
    normfree.save(fused, tmp_path / "fused.safetensors")
    done = CliRunner().invoke(app, ["verify", str(tmp_path / "fused.safetensors"), "--json"])
    assert (done.exit_code, json.loads(done.stdout)["ok"]) == (0, None)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
def test_a_model_that_was_scripted_is_what_it_was() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())).eval()
    fused = normfree.fuse(normfree.convert(model, init="preserve", inputs=X))
    assert torch.allclose(torch.jit.script(fused)(X), model(X), atol=1e-5)
    report = normfree.verify(fused, model, X)
    assert report.ok, str(report)
