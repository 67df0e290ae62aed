"""What ``save`` writes, ``load`` can read; or ``save`` says what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from harness import Block, noise, randomise
from small import preactivated
from torch import nn
from torch.nn.utils import parametrizations

import normfree
from normfree.checkpoint import read_header
from normfree.checkpoint.saving import SaveWarning
from normfree.errors import CheckpointError, SourceError, UsageError


def test_source_and_classes_come_from_timms_configuration(tmp_path: Path) -> None:
    model = normfree.convert(randomise(timm.create_model("test_resnet", num_classes=7))).eval()
    for name, about in (("a", {}), ("b", {"source": "timm:test_resnet"})):
        normfree.save(model, tmp_path / f"{name}.safetensors", **about)
        header = read_header(tmp_path / f"{name}.safetensors")
        assert (header.source, header.num_classes) == ("timm:test_resnet", 7)
    x = noise(2, 3, 32, 32)
    assert torch.equal(normfree.load(tmp_path / "a.safetensors").eval()(x), model(x))
    normfree.save(model, tmp_path / "hub")
    assert torch.equal(normfree.load(tmp_path / "hub").eval()(x), model(x))


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (
            {"source": "torchvision:resnet18"},
            r"as torchvision:resnet18: .*\n.*fc\.weight is \(3, 512\)(.|\n)*num_classes",
        ),
        ({"source": "torchvision:resnet34", "num_classes": 3}, r"as torchvision:resnet34: .*\n  missing: layer1\.2"),
        ({"source": "timm:resnet18", "num_classes": 3}, "as timm:resnet18: "),
        ({"source": "torchvision:resnet19"}, "as torchvision:resnet19: .*did you mean"),
    ],
)
def test_what_load_could_not_read_is_refused(tmp_path: Path, about: dict[str, Any], message: str) -> None:
    model = normfree.convert(torchvision.models.resnet18(num_classes=3))
    if about["source"] == "timm:resnet18":
        model = normfree.convert(timm.create_model("resnet34", num_classes=3))
    with pytest.raises((UsageError, SourceError), match=message):
        normfree.save(model, tmp_path / "a.safetensors", **about)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("build", [Block, lambda: timm.create_model("test_resnet", in_chans=1)])
def test_what_no_zoo_knows_is_said(tmp_path: Path, build: Any) -> None:
    model = normfree.convert(build())
    with pytest.warns(SaveWarning, match=r"no source= names the architecture .*load\(path, model=\.\.\.\)"):
        normfree.save(model, tmp_path / "a.safetensors")
    loaded = normfree.load(tmp_path / "a.safetensors", model=build())
    assert loaded.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("init", ["skipinit", "preserve"])
def test_a_parametrization_is_refused_by_name(tmp_path: Path, init: Any) -> None:
    model = normfree.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Block()), init=init)
    parametrizations.weight_norm(model[0])
    parametrizations.spectral_norm(model[2].conv2)
    with pytest.raises(
        UsageError, match=r"save takes plain weights only(.|\n)*  - 0 \((.|\n)*  - 2\.conv2 \(.*remove_para"
    ):
        normfree.save(model, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
    torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    torch.nn.utils.parametrize.remove_parametrizations(model[2].conv2, "weight")
    with pytest.warns(SaveWarning):
        normfree.save(model, tmp_path / "a.safetensors")


def test_one_of_timms_classes_that_it_did_not_build(tmp_path: Path) -> None:
    with pytest.warns(SaveWarning, match="this ResNetV2: to load"):
        normfree.save(normfree.convert(preactivated(1)), tmp_path / "a.safetensors")
    assert read_header(tmp_path / "a.safetensors").source is None


class Wired(nn.Module):
    """Two layers with their norms, and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(self.b(self.first(self.a(x)).relu()))


class Crossed(Wired):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.first(self.b(self.second(self.a(x)).relu()))


class Unsummed(Wired):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.b(self.first(self.a(x)).relu()))


@pytest.mark.parametrize("init", ["preserve", "skipinit"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [(Crossed, "first is fed by b, in the file by a, second is fed by a"), (Unsummed, "its own forward adds nothing")],
)
def test_another_architecture_with_the_same_names_is_refused(
    kind: type[Wired], message: str, init: Any, tmp_path: Path
) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.warns(SaveWarning):
        normfree.save(normfree.convert(randomise(Wired()), init=init), path)
    with pytest.raises(CheckpointError, match=message):
        normfree.load(path, model=kind())
    x = noise(2, 3, 6, 6)
    assert normfree.load(path, model=Wired()).eval()(x).shape == x.shape
