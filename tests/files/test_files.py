"""Checkpoints of any origin: what is read, what is refused, and where nothing is written."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import randomise
from tied import Net, write

from normfree import files
from normfree.errors import CheckpointError, OutputError


def _prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("ending", [".safetensors", ".pth", ".pt", ".bin", ".tar"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_reads_every_ending_and_prefix(tmp_path: Path, ending: str, prefix: str) -> None:
    state = {key: value.clone() for key, value in randomise(Net()).state_dict().items()}
    path = write(_prefixed(prefix, state), tmp_path / f"checkpoint{ending}")
    found = files.read_state_dict(path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_ema", "state_dict_ema"])
def test_reads_wrapped_state_dicts(tmp_path: Path, key: str) -> None:
    state = Net().state_dict()
    path = write({"epoch": 3, key: _prefixed("module.", state), "optimizer": {"lr": 0.1}}, tmp_path / "c.pth.tar")
    assert files.read_state_dict(path).keys() == state.keys()


def test_averaged_weights_come_first(tmp_path: Path) -> None:
    plain, averaged = Net().state_dict(), Net().state_dict()
    path = write({"state_dict": plain, "state_dict_ema": averaged}, tmp_path / "c.pth")
    assert torch.equal(files.read_state_dict(path)["stem.weight"], averaged["stem.weight"])


class Malicious:
    """Would create a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_never_unpickles_arbitrary_objects(tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    path = write({"state_dict": Net().state_dict(), "extra": Malicious(trap)}, tmp_path / "evil.pth")
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
    path = write({key: v.clone() for key, v in Net().state_dict().items()}, tmp_path / f"cut{ending}")
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
        files.read_state_dict(write(content, tmp_path / "c.pth"))


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
    assert "give num_classes= (--num-classes 9)" in text
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_input_is_never_the_output(tmp_path: Path) -> None:
    path = write(Net().state_dict(), tmp_path / "c.pth")
    link = tmp_path / "link.pth"
    link.symlink_to(path)
    for out in (path, link):
        with pytest.raises(OutputError, match="is the input"):
            files.check_output(out, overwrite=True, inputs=(path,))


def test_a_folder_that_is_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(OutputError, match="not writable"):
        files.check_output(tmp_path / "x.safetensors", overwrite=False)
