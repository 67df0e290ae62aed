"""Conversion from file to file: the same bytes, in little memory, one file or a folder of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from harness import randomise
from marks import broad
from torch import nn
from typer.testing import CliRunner, Result

import normfree
from normfree import files, zoo
from normfree.checkpoint import convert_file
from normfree.cli import app
from normfree.errors import CheckpointError, OutputError, SourceError, UnsupportedModelError

NAME = "timm:resnet10t"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def write(state: dict[str, torch.Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, path)
    else:
        torch.save({"epoch": 1, "state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    return path


def whole(name: str, checkpoint: Path, out: Path, **options: Any) -> bytes:
    """What :func:`normfree.save` writes of the converted model."""
    model = zoo.build(zoo.find(name))
    files.load_weights(model, files.read_state_dict(checkpoint), checkpoint)
    torch.manual_seed(0)
    normfree.save(normfree.convert(model, **options), out, source=name, overwrite=True)
    return out.read_bytes()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(
        randomise(timm.create_model("resnet10t")).state_dict(), tmp_path_factory.mktemp("in") / "in.safetensors"
    )


@pytest.mark.parametrize(
    ("name", "init"),
    [
        (NAME, "preserve"),
        (NAME, "skipinit"),
        ("torchvision:regnet_y_400mf", "skipinit"),
        ("timm:levit_128s", "preserve"),
        *broad(("torchvision:regnet_y_400mf", "preserve"), ("timm:levit_128s", "skipinit")),
    ],
)
def test_the_same_bytes_as_from_memory(name: str, init: str, tmp_path: Path) -> None:
    state = randomise(zoo.build(zoo.find(name))).state_dict()
    for ending in (".safetensors", ".pth"):
        source = write(state, tmp_path / f"in{ending}")
        torch.manual_seed(0)
        convert_file(name, source, tmp_path / "streamed.safetensors", init=init, overwrite=True)
        assert (tmp_path / "streamed.safetensors").read_bytes() == whole(
            name, source, tmp_path / "a.safetensors", init=init
        )


def test_half_precision_old_pickles_and_short_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normfree.checkpoint.streaming._PIECE", 5000)
    state = {key: value.half() for key, value in randomise(timm.create_model("resnet10t")).state_dict().items()}
    torch.save(state, tmp_path / "new.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    expected = whole(NAME, tmp_path / "new.pth", tmp_path / "a.safetensors")
    for name in ("new.pth", "old.pth"):
        convert_file(NAME, tmp_path / name, tmp_path / "b.safetensors", overwrite=True)
        assert (tmp_path / "b.safetensors").read_bytes() == expected


def test_a_refused_checkpoint_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    state = files.read_state_dict(checkpoint)
    del state["fc.bias"]
    other = write(state, tmp_path / "other.safetensors")
    for source, message in (
        (NAME, "missing: fc.bias"),
        ("timm:resnet18", "missing: conv1.weight, layer1.1.conv1.weight.*"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert_file(source, other, tmp_path / "out.safetensors")
    with pytest.raises(SourceError):
        convert_file("timm:nothing", other, tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == [other]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("running_var", -0.5, r"layer2\.0\.bn1 \(BatchNorm2d\): its running variance is negative \(-0\.5\)"),
        ("running_var", float("nan"), r"layer2\.0\.bn1 .*running variance is not finite; the checkpoint is damaged"),
        ("running_mean", float("inf"), r"layer2\.0\.bn1 .*running mean is not finite"),
        ("weight", float("nan"), r"layer2\.0\.bn1 .*its weight is not finite"),
    ],
)
def test_broken_statistics_are_named_by_layer(
    checkpoint: Path, tmp_path: Path, key: str, value: float, message: str
) -> None:
    state = {name: tensor.clone() for name, tensor in files.read_state_dict(checkpoint).items()}
    state[f"layer2.0.bn1.{key}"][3] = value
    with pytest.raises(UnsupportedModelError, match=message):
        convert_file(NAME, write(state, tmp_path / "in.safetensors"), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = 16  # after every carried layer was read for its constants, while weights are written
    state = randomise(timm.create_model("resnet10t")).state_dict()
    source = write(state, tmp_path / "in.safetensors")
    real, calls = files.reader, []

    def reader(path: Path, choice: files.Choice) -> Any:
        opened = real(path, choice)

        def again() -> Any:
            calls.append(path)
            if len(calls) == changes:
                os.utime(path, (1, 1))
            return opened()

        return again

    monkeypatch.setattr("normfree.checkpoint.streaming.reader", reader)
    with pytest.raises(CheckpointError, match="the file changed while it was read"):
        convert_file(NAME, source, tmp_path / "out.safetensors")
    assert len(calls) == changes
    assert [path.name for path in tmp_path.iterdir()] == ["in.safetensors"]


def test_the_command_streams_without_proofs(checkpoint: Path, tmp_path: Path) -> None:
    done = run("convert", NAME, "-o", tmp_path / "out.safetensors", "--checkpoint", checkpoint, "--no-verify", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["plan"]["init"] == "preserve"
    assert (tmp_path / "out.safetensors").read_bytes() == whole(NAME, checkpoint, tmp_path / "a.safetensors")


@pytest.mark.parametrize("options", [("--no-verify",), ()], ids=["streamed", "proven"])
def test_a_folder_of_checkpoints(checkpoint: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(checkpoint.read_bytes())
    (folder / "b.pth").write_bytes(b"not a checkpoint")
    (folder / "c\x1b[31m.safetensors").write_bytes(checkpoint.read_bytes()[:1000])
    (folder / "d.safetensors").write_bytes(checkpoint.read_bytes())
    (folder / "notes.txt").write_text("not read")
    done = run("convert", NAME, "--checkpoint", folder, "-o", tmp_path / "out", *options)
    assert done.exit_code == 1
    assert "2 of 4 converted" in done.stdout
    assert "b.pth: not a checkpoint" in done.stdout
    assert "\x1b[31m" not in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.safetensors", "d.safetensors"]
    again = run("convert", NAME, "--checkpoint", folder, "-o", tmp_path / "out", "--json", "--no-verify")
    assert [row["output"] for row in json.loads(again.stdout)["files"]] == [None] * 4
    (folder / "b.pth").unlink()
    (folder / "c\x1b[31m.safetensors").unlink()
    assert run("convert", NAME, "--checkpoint", folder, "-o", tmp_path / "out", "--force", "--no-verify").exit_code == 0


def test_folders_that_make_no_sense(checkpoint: Path, tmp_path: Path) -> None:
    empty = run("convert", NAME, "--checkpoint", tmp_path, "-o", tmp_path / "out")
    assert empty.exit_code == 2
    assert "holds no checkpoints" in empty.stderr
    one = run("convert", NAME, "--checkpoint", checkpoint.parent, "-o", tmp_path / "out.safetensors")
    assert one.exit_code == 2
    assert "is converted into a folder" in one.stderr
    assert list(tmp_path.iterdir()) == []


def _convert(arguments: tuple[Path, Path]) -> bytes:
    checkpoint, out = arguments
    convert_file(NAME, checkpoint, out)
    return out.read_bytes()


@pytest.mark.parametrize("processes", [0, *broad(2)])
def test_threads_and_processes_write_the_same_file(checkpoint: Path, tmp_path: Path, processes: int) -> None:
    expected = whole(NAME, checkpoint, tmp_path / "a.safetensors")
    found: list[bytes] = []
    jobs = [(checkpoint, tmp_path / f"thread{i}.safetensors") for i in range(4)]
    threads = [threading.Thread(target=lambda job=job: found.append(_convert(job))) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if processes:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            found += pool.map(_convert, [(checkpoint, tmp_path / f"process{i}.safetensors") for i in range(processes)])
    assert found == [expected] * (4 + processes)


def test_threads_that_write_one_name_leave_one_whole_file(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    threads = [
        threading.Thread(target=convert_file, args=(NAME, checkpoint, out), kwargs={"overwrite": True})
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(tmp_path.iterdir()) == [out]
    assert isinstance(normfree.load(out), nn.Module)


def test_what_cannot_be_built_without_memory_is_built(tmp_path: Path) -> None:
    """Its constructor runs a forward pass, as those of a few networks with a convolutional stem do."""
    name = "torchvision:ssdlite320_mobilenet_v3_large"
    source = write(randomise(zoo.build(zoo.find(name))).state_dict(), tmp_path / "in.safetensors")
    convert_file(name, source, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == whole(name, source, tmp_path / "a.safetensors")


def test_permission_lost_while_writing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"precious")

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OutputError, match=r"out\.safetensors: cannot be written: .*Permission denied"):
        convert_file(NAME, checkpoint, out, overwrite=True)
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_bytes() == b"precious"


_KILLED = """
import os, signal, sys, torch
from normfree.checkpoint import convert_file, streaming
pieces = streaming._pieces
def call(*arguments):
    for i, piece in enumerate(pieces(*arguments)):
        if i == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        yield piece
streaming._pieces = call
convert_file("timm:resnet10t", sys.argv[1], sys.argv[2], overwrite=True)
"""


def test_a_killed_process_leaves_the_old_file(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"precious")
    done = subprocess.run([sys.executable, "-c", _KILLED, checkpoint, out], capture_output=True, check=False)
    assert done.returncode == -9
    assert out.read_bytes() == b"precious"
    convert_file(NAME, checkpoint, out, overwrite=True)
    assert out.read_bytes() == whole(NAME, checkpoint, tmp_path / "a.safetensors")
