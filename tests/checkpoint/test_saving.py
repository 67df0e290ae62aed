"""Converted models in files: they come back the same, are named if they do not fit, and are never half written."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from harness import Block, assert_close, noise, randomise
from readings import plan_of
from tied import Net, write
from torch import nn

import normfree
from normfree import files, zoo
from normfree.checkpoint import read_header
from normfree.errors import CheckpointError, OutputError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore::normfree.checkpoint.saving.SaveWarning")

X = noise(2, 3, 8, 8)


@pytest.mark.parametrize("init", ["skipinit", "preserve"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_return_the_same_model(tmp_path: Path, init: Any, dtype: torch.dtype) -> None:
    converted = normfree.convert(randomise(Net()), init=init, alpha=0.25).to(dtype).eval()
    normfree.save(converted, tmp_path / "net.safetensors")
    loaded = normfree.load(tmp_path / "net.safetensors", model=Net()).eval()
    assert torch.equal(loaded(X.to(dtype)), converted(X.to(dtype)))
    assert plan_of(loaded) == plan_of(converted)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert loaded.head.weight is loaded.tied.weight


def test_the_file_reads_with_plain_safetensors(tmp_path: Path) -> None:
    converted = normfree.convert(randomise(Net()))
    normfree.save(converted, tmp_path / "net.safetensors")
    plain = safetensors.torch.load_file(tmp_path / "net.safetensors")
    assert torch.equal(plain["conv.weight"], converted.conv.weight)
    assert read_header(tmp_path / "net.safetensors").plan == plan_of(converted)


def test_an_architecture_by_name(tmp_path: Path) -> None:
    model = normfree.convert(zoo.build(zoo.find("timm:resnet18"), num_classes=7))
    normfree.save(model, tmp_path / "r.safetensors", source="timm:resnet18", num_classes=7)
    loaded = normfree.load(tmp_path / "r.safetensors")
    assert type(loaded) is type(model)
    assert loaded.num_classes == 7


def test_an_architecture_that_asks_for_its_version(tmp_path: Path) -> None:
    original = randomise(zoo.build(zoo.find("torchvision:mnasnet0_5"), num_classes=3))
    path = write(original.state_dict(), tmp_path / "in.safetensors")
    other = zoo.build(zoo.find("torchvision:mnasnet0_5"), num_classes=3)
    files.load_weights(other, files.read_state_dict(path), path)
    normfree.save(normfree.convert(other), tmp_path / "m.safetensors", source="torchvision:mnasnet0_5", num_classes=3)
    restored = normfree.restore(normfree.load(tmp_path / "m.safetensors"))
    expected = original.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in restored.state_dict().items())


def test_load_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    normfree.save(normfree.convert(randomise(Net())), path)
    with pytest.raises(UsageError, match="names no architecture.*model="):
        normfree.load(path)
    with pytest.raises(CheckpointError, match="does not fit this Sequential.*'bn'"):
        normfree.load(path, model=nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with pytest.raises(UsageError, match="got the class Net: call it"):
        normfree.load(path, model=Net)  # type: ignore[arg-type]
    torch.save(Net().state_dict(), tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match="not a readable safetensors.*converted first"):
        normfree.load(tmp_path / "net.pth", model=Net())
    other = Net()
    other.head = nn.Linear(4, 6)
    with pytest.raises(CheckpointError, match="does not belong"):
        normfree.load(path, model=other)
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="not one that normfree wrote"):
        normfree.load(tmp_path / "plain.safetensors", model=Net())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"format": 99, "versions": {"normfree": "9.8"}},
            "format 99 of normfree 9.8, newer than the 7 known here; update normfree",
        ),
        ({"plan": {"init": "preserve"}}, "header cannot be read: plan: .*missing 4 required"),
        ({"plan": None}, "header cannot be read: plan is None, where init, .* are expected"),
        ({"reference": {"shape": "x"}}, "header cannot be read: reference.shape is 'x'"),
    ],
)
def test_a_header_that_is_not_ours(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "net.safetensors"
    normfree.save(normfree.convert(Net()), path)
    with safetensors.safe_open(path, framework="pt") as file:
        raw = json.loads(file.metadata()["normfree"])
    state = safetensors.torch.load_file(path)
    safetensors.torch.save_file(state, path, {"normfree": json.dumps({**raw, **change})})
    with pytest.raises(CheckpointError, match=message):
        normfree.load(path, model=Net())


def test_the_plan_survives_json() -> None:
    plan = normfree.plan(randomise(Net()), init="preserve")
    assert normfree.Plan.from_json(plan.to_json()) == plan


def test_save_refuses_to_overwrite_and_to_write_nowhere(tmp_path: Path) -> None:
    converted = normfree.convert(Net())
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists already"):
        normfree.save(converted, path)
    assert path.read_bytes() == b"precious"
    normfree.save(converted, path, overwrite=True)
    assert_close(normfree.load(path, model=Net())(X), converted(X))
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(OutputError, match=r"the folder .*missing does not exist"):
        normfree.save(converted, tmp_path / "missing" / "net.safetensors")
    with pytest.raises(OutputError, match="is a folder"):
        normfree.save(converted, tmp_path / "folder.safetensors")
    with pytest.raises(UsageError, match="end its name in .safetensors, or name a folder"):
        normfree.save(converted, tmp_path / "net.pth")
    with pytest.raises(UsageError, match="carries no plan"):
        normfree.save(Net(), tmp_path / "other.safetensors")


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"precious")
    model = normfree.convert(nn.Sequential(nn.Conv2d(3, 512, 9, bias=False), nn.BatchNorm2d(512)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        normfree.save(model, path, overwrite=True)
    except OutputError as error:
        said = str(error)
    else:
        said = "nothing was wrong"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written" in said
    assert path.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["net.safetensors"]  # noqa: PTH208  # the temporary file is hidden


def test_alpha_on_more_channels_than_a_layer_has(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    normfree.save(normfree.convert(Block()), path)
    with safetensors.safe_open(path, framework="pt") as file:
        raw = json.loads(file.metadata()["normfree"])
    alpha = next(alpha for total in raw["plan"]["sums"] for alpha in total["alphas"])
    alpha["channels"] = [0, 2**19]
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {"normfree": json.dumps(raw)})
    with pytest.raises(CheckpointError, match=r"alpha scales channels \(0, 524288\)"):
        normfree.load(path, model=Block())
