"""Checkpoints: what is read, what is refused, and that nothing is ever lost or half written."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import resource
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from harness import assert_close, noise, randomise
from readings import plan_of
from torch import nn

import normfree
from normfree import files, zoo
from normfree.checkpoint import read_header
from normfree.errors import CheckpointError, OutputError, UsageError
from normfree.files.plain import from_plain
from normfree.proofs.reference import Reference


class Net(nn.Module):
    """One residual block with a tied classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)
        self.tied = nn.Linear(4, 5)
        self.tied.weight = self.head.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(x + self.bn2(self.conv(x)))
        x = x.mean((2, 3))
        return self.head(x) + self.tied(x)


X = noise(2, 3, 8, 8)


def _write(state: Any, path: Path) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return path


def _prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("ending", [".safetensors", ".pth", ".pt", ".bin", ".tar"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_reads_every_ending_and_prefix(tmp_path: Path, ending: str, prefix: str) -> None:
    state = {key: value.clone() for key, value in randomise(Net()).state_dict().items()}
    path = _write(_prefixed(prefix, state), tmp_path / f"checkpoint{ending}")
    found = files.read_state_dict(path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_ema", "state_dict_ema"])
def test_reads_wrapped_state_dicts(tmp_path: Path, key: str) -> None:
    state = Net().state_dict()
    path = _write({"epoch": 3, key: _prefixed("module.", state), "optimizer": {"lr": 0.1}}, tmp_path / "c.pth.tar")
    assert files.read_state_dict(path).keys() == state.keys()


def test_averaged_weights_come_first(tmp_path: Path) -> None:
    plain, averaged = Net().state_dict(), Net().state_dict()
    path = _write({"state_dict": plain, "state_dict_ema": averaged}, tmp_path / "c.pth")
    assert torch.equal(files.read_state_dict(path)["stem.weight"], averaged["stem.weight"])


class Malicious:
    """Would create a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_never_unpickles_arbitrary_objects(tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    path = _write({"state_dict": Net().state_dict(), "extra": Malicious(trap)}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="unpickle arbitrary objects.*refused"):
        files.read_state_dict(path)
    with (tmp_path / "evil.bin").open("wb") as file:
        pickle.dump(Malicious(trap), file)
    with pytest.raises(CheckpointError, match=r"evil\.bin"):
        files.read_state_dict(tmp_path / "evil.bin")
    assert not trap.exists()


def test_a_whole_pickled_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save(Net(), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"torch\.save\(model\.state_dict\(\)"):
        files.read_state_dict(tmp_path / "model.pth")


@pytest.mark.parametrize("ending", [".safetensors", ".pth"])
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_truncated_and_empty_files_are_named(tmp_path: Path, ending: str, fraction: float) -> None:
    path = _write({key: v.clone() for key, v in Net().state_dict().items()}, tmp_path / f"cut{ending}")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * fraction)])
    with pytest.raises(CheckpointError, match=f"cut{ending}: .*(empty|damaged|not a readable)"):
        files.read_state_dict(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.pth", b"not a checkpoint at all", "not a checkpoint"),
        ("text.safetensors", b"not a checkpoint at all", "not a readable safetensors"),
        ("notes.txt", b"x", "unknown ending '.txt'"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        files.read_state_dict(tmp_path / name)
    with pytest.raises(CheckpointError, match="no such file"):
        files.read_state_dict(tmp_path / "missing.pth")


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], {}, {"state_dict": {"a": 1}}])
def test_files_without_a_state_dict(tmp_path: Path, content: Any) -> None:
    with pytest.raises(CheckpointError, match="holds no state dict"):
        files.read_state_dict(_write(content, tmp_path / "c.pth"))


def test_another_architecture_is_named_by_its_first_differences(tmp_path: Path) -> None:
    state = Net().state_dict()
    state["stranger"] = torch.zeros(1)
    state["conv.weight"] = torch.zeros(9, 4, 3, 3)
    del state["head.bias"]
    model = Net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError) as caught:
        files.load_weights(model, state, "c.pth")
    text = str(caught.value)
    assert "missing: head.bias" in text
    assert "unexpected: stranger" in text
    assert "conv.weight is (9, 4, 3, 3), the model wants (4, 4, 3, 3)" in text
    assert "give its num_classes" in text
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


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
    path = _write(original.state_dict(), tmp_path / "in.safetensors")
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
            "format 99 of normfree 9.8, newer than the 2 known here; update normfree",
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


def test_the_input_is_never_the_output(tmp_path: Path) -> None:
    path = _write(Net().state_dict(), tmp_path / "c.pth")
    link = tmp_path / "link.pth"
    link.symlink_to(path)
    for out in (path, link):
        with pytest.raises(OutputError, match="is the input"):
            files.check_output(out, overwrite=True, inputs=(path,))


def test_a_folder_that_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(OutputError, match="not writable"):
        files.check_output(tmp_path / "x.safetensors", overwrite=False)


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


def test_a_reference_tells_the_original_from_another(tmp_path: Path) -> None:
    original = randomise(Net()).eval()
    reference = Reference.of(original, X)
    assert from_plain(Reference, json.loads(json.dumps(dataclasses.asdict(reference)))) == reference
    error = reference.error(normfree.convert(original))
    assert error is not None
    assert error <= 8 * reference.rounding
    other = reference.error(normfree.convert(randomise(Net(), seed=1)))
    assert other is not None
    assert other > 1e-3
    assert dataclasses.replace(reference, first=(0.0,)).error(original) is None
