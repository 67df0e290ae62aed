"""Folders in the layout of the Hugging Face Hub, other classifiers, and commands that turn one file into another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from harness import assert_close, noise, randomise
from small import preactivated
from torch import nn
from typer.testing import CliRunner, Result

import normfree
from normfree.cli import app
from normfree.errors import CheckpointError, OutputError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore::normfree.checkpoint.saving.SaveWarning")

X = noise(2, 3, 64, 64)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def original() -> nn.Module:
    return randomise(timm.create_model("resnet10t", num_classes=5)).eval()


@pytest.fixture(scope="module")
def file(original: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "r.safetensors"
    normfree.save(normfree.convert(original, init="preserve"), path, source="timm:resnet10t", num_classes=5)
    return path


@pytest.mark.parametrize("source", [None, "timm:resnet10t"])
def test_a_folder_holds_what_timm_expects(original: nn.Module, tmp_path: Path, source: str | None) -> None:
    converted = normfree.convert(original, init="preserve")
    normfree.save(converted, tmp_path / "hub", source=source)
    assert sorted(p.name for p in (tmp_path / "hub").iterdir()) == ["config.json", "model.safetensors"]
    config, name, _ = timm.models._hub.load_model_config_from_path(tmp_path / "hub")
    assert (name, config["num_classes"]) == ("resnet10t", 5)
    with pytest.raises(OutputError, match="exists already"):
        normfree.save(converted, tmp_path / "hub")
    if source is None:  # the architecture is in the configuration
        assert torch.equal(normfree.load(tmp_path / "hub").eval()(X), converted(X))


def test_a_folder_of_another_library(tmp_path: Path) -> None:
    converted = normfree.convert(torchvision.models.resnet18(num_classes=3)).eval()
    normfree.save(converted, tmp_path / "hub", source="torchvision:resnet18", num_classes=3)
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config == {"architecture": "torchvision:resnet18", "num_classes": 3}
    assert torch.equal(normfree.load(tmp_path / "hub").eval()(X), converted(X))


def test_a_restored_folder_is_read_by_timm(original: nn.Module, file: Path, tmp_path: Path) -> None:
    done = run("restore", file, "-o", tmp_path / "hub")
    assert done.exit_code == 0, done.output
    theirs = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert torch.equal(theirs(X), original(X))


@pytest.mark.parametrize("given", [False, True], ids=["built", "given"])
def test_another_classifier_is_drawn_anew(file: Path, given: bool) -> None:
    model = timm.create_model("resnet10t", num_classes=9) if given else None
    loaded = normfree.load(file, model=model, num_classes=9).eval()
    same = normfree.load(file).eval()
    assert loaded.fc.weight.shape == (9, 512)
    assert bool((loaded.fc.weight != 0).any())
    assert torch.equal(loaded.forward_features(X), same.forward_features(X))


def test_nothing_but_the_classifier_may_differ(file: Path) -> None:
    with pytest.raises(CheckpointError, match=r"to this ResNet:\n  other shapes: fc\.weight is \(5, 512\)"):
        normfree.load(file, model=timm.create_model("resnet10t", num_classes=9))
    with pytest.raises(CheckpointError, match=r"conv1\.0\.weight is"):
        normfree.load(file, model=timm.create_model("resnet10t", num_classes=9, in_chans=1), num_classes=9)


def test_fuse_writes_plain_layers(original: nn.Module, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "fused.safetensors"
    done = run("fuse", file, "-o", out, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"ok": True, "output": str(out), "warnings": []}
    fused = normfree.load(out).eval()
    assert type(fused.layer1[0].conv2) is nn.Conv2d
    assert_close(fused(X), original(X), 1e-5)
    assert run("verify", out).exit_code == 0
    done = run("fuse", out, "-o", tmp_path / "again.safetensors")
    assert done.exit_code == 2
    assert "is fused already" in done.stderr


def test_restore_writes_the_original(original: nn.Module, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "bn.safetensors"
    assert run("restore", file, "-o", out).exit_code == 0
    plain: Any = timm.create_model("resnet10t", num_classes=5, checkpoint_path=str(out))
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), original.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("command", ["fuse", "restore"])
def test_outputs_are_refused_before_anything_is_read(command: str, file: Path, tmp_path: Path) -> None:
    before = file.read_bytes()
    for out, message in ((file, "is the input"), (tmp_path / "x.pth", "end its name in .safetensors")):
        done = run(command, file, "-o", out, "--force")
        assert done.exit_code == 2
        assert message in done.stderr
    assert run(command, tmp_path / "missing.safetensors", "-o", tmp_path / "x.safetensors").exit_code == 1
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == []


def test_a_failed_load_says_what_the_architecture_is_missing(tmp_path: Path) -> None:
    normfree.save(normfree.convert(preactivated(1)), tmp_path / "r.safetensors")
    with pytest.raises(UsageError, match="names no architecture"):
        normfree.load(tmp_path / "r.safetensors")
