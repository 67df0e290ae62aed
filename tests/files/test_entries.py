"""Where the weights of a checkpoint are, under any key and behind any prefix; and what was taken is said."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from harness import randomise
from tied import Net, write
from torch.optim.swa_utils import AveragedModel
from typer.testing import CliRunner

import normfree
from normfree import files
from normfree.checkpoint import convert_file
from normfree.cli import app
from normfree.errors import CheckpointError
from normfree.files import Choice

STATE = {key: value.clone() for key, value in randomise(Net()).state_dict().items()}
OTHER = {key: value + 1 for key, value in STATE.items()}


def behind(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in STATE.items()}


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"ema": STATE, "model": OTHER}, "ema"),
        ({"model": OTHER, "ema": {"module": STATE, "updates": 3}}, "ema.module"),
        ({"state_dict": OTHER, "state_dict_ema": STATE}, "state_dict_ema"),
        ({"params": OTHER, "params_ema": STATE}, "params_ema"),
        ({"model_state_dict": OTHER, "ema_state_dict": STATE}, "ema_state_dict"),
        (
            {"model_state_dict": STATE, "optimizer_state_dict": {"state": {0: {"step": torch.ones(1)}}}},
            "model_state_dict",
        ),
        ({"net": STATE, "acc": 93.1, "epoch": 7}, "net"),
        ({"module": STATE}, "module"),
        ({"generator": STATE, "epoch": 1}, "generator"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_entry_that_is_taken_is_said(tmp_path: Path, content: dict[str, Any], key: str) -> None:
    state, note = files.read_weights(write(content, tmp_path / "c.ckpt"))
    assert torch.equal(state["stem.weight"], STATE["stem.weight"])
    assert f"c.ckpt: took the weights under {key!r}" in note
    others = [name for name, value in content.items() if value is OTHER]
    assert (f"also there: {others[0]} (--key)" in note) if others else ("also there" not in note)


def test_another_entry_may_be_asked_for(tmp_path: Path) -> None:
    path = write({"ema": {"module": STATE}, "model": OTHER, "args": 1}, tmp_path / "c.pth")
    assert torch.equal(files.read_state_dict(path, Choice("model"))["stem.weight"], OTHER["stem.weight"])
    assert files.read_state_dict(path, Choice("ema.module")).keys() == STATE.keys()
    with pytest.raises(CheckpointError, match=r"holds no state dict 'student' \(found: ema\.module, model\)"):
        files.read_state_dict(path, Choice("student"))
    path = write({"netG": STATE, "netD": OTHER}, tmp_path / "two.pth")
    with pytest.raises(
        CheckpointError, match=r"holds several state dicts; say which one by --key \(found: netG, netD\)"
    ):
        files.read_state_dict(path)


@pytest.mark.parametrize("prefix", ["model.", "net.", "backbone.", "model.backbone.", "module.net."])
@pytest.mark.parametrize("ending", [".safetensors", ".ckpt"])
def test_a_prefix_that_all_names_share_comes_off(tmp_path: Path, prefix: str, ending: str) -> None:
    path = write(behind(prefix), tmp_path / f"c{ending}")
    model = Net()
    assert files.load_weights(model, files.read_state_dict(path), path) == prefix.removeprefix("module.")
    assert torch.equal(model.stem.weight, STATE["stem.weight"])


def test_a_prefix_of_some_names_is_named_and_may_be_asked_for(tmp_path: Path) -> None:
    path = write({"state_dict": behind("model.") | {"loss.weight": torch.ones(3)}}, tmp_path / "c.ckpt")
    with pytest.raises(CheckpointError, match=r"the model's names are there behind 'model\.': --prefix model\."):
        files.load_weights(Net(), files.read_state_dict(path), path)
    assert files.read_state_dict(path, Choice(prefix="model.")).keys() == STATE.keys()
    with pytest.raises(CheckpointError, match=r"no name begins with --prefix 'net\.' \(found: model\., loss\.\)"):
        files.read_state_dict(path, Choice(prefix="net."))


def test_a_count_of_averages_comes_off(tmp_path: Path) -> None:
    model = randomise(Net())
    path = write(AveragedModel(model).state_dict(), tmp_path / "c.pth")
    assert files.read_state_dict(path).keys() == STATE.keys()


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old format"])
def test_arguments_and_numpy_scalars_beside_the_weights(tmp_path: Path, old: bool) -> None:
    content = {
        "model": STATE,
        "args": argparse.Namespace(lr=0.1, betas=(0.9, 0.95)),
        "best": [np.float64(0.5), np.float32(1), np.int64(3), np.bool_(True)],
        "out": [tmp_path, PureWindowsPath("C:/runs"), SimpleNamespace(when=datetime.datetime(2026, 1, 2))],
        "took": [datetime.timedelta(seconds=3), datetime.date(2026, 1, 2)],
    }
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=not old)
    assert files.read_state_dict(tmp_path / "c.pth").keys() == STATE.keys()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


class Settings:
    """What only the training script knows."""


def test_what_is_not_unpickled_is_named(tmp_path: Path) -> None:
    torch.save({"model": STATE, "config": Settings()}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"refused \(found: [\w.]*test_entries\.Settings\)\. Save its state_dict"):
        files.read_state_dict(tmp_path / "c.pth")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_the_command_line_says_and_asks(tmp_path: Path) -> None:
    """As Lightning saves it: averaged weights beside the others, all behind one prefix, with something of its own."""
    model = randomise(timm.create_model("test_resnet", num_classes=3)).eval()
    state = {f"net.{key}": value for key, value in model.state_dict().items()}
    fresh = {f"net.{key}": value for key, value in timm.create_model("test_resnet", num_classes=3).state_dict().items()}
    path = tmp_path / "last.ckpt"
    torch.save({"epoch": 2, "state_dict": fresh, "ema": state, "hyper_parameters": {"lr": 0.1}}, path)
    about = (
        "timm:test_resnet",
        "--checkpoint",
        path,
        "--num-classes",
        3,
        "-o",
        tmp_path / "out.safetensors",
        "--force",
    )
    x = torch.randn(2, 3, 32, 32)
    for options in ((), ("--no-verify",)):
        done = run("convert", *about, *options)
        assert done.exit_code == 0, done.output
        assert "took the weights under 'ema'; also there: state_dict (--key)" in done.stderr
        assert "prefix 'net.'" in done.stderr
        with torch.no_grad():
            assert torch.allclose(normfree.load(tmp_path / "out.safetensors").eval()(x), model(x), atol=1e-4)
    torch.save({"state_dict": state | {"loss.weight": torch.ones(3)}}, path)
    done = run("convert", *about, "--no-verify")
    assert done.exit_code == 1
    assert "behind 'net.': --prefix net." in done.stderr
    for options in ((), ("--no-verify",)):
        assert run("convert", *about, *options, "--prefix", "net.", "--key", "state_dict").exit_code == 0
    convert_file("timm:test_resnet", path, tmp_path / "b.safetensors", num_classes=3, choice=Choice(prefix="net."))
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "out.safetensors").read_bytes()
    assert run("verify", tmp_path / "out.safetensors", "--checkpoint", path, "--prefix", "net.").exit_code == 0


@pytest.mark.parametrize("prefix", ["", "model.", "module."])
def test_another_number_of_classes_is_named_with_the_option(tmp_path: Path, prefix: str) -> None:
    state = timm.create_model("test_resnet", num_classes=5).state_dict()
    torch.save({"state_dict": {prefix + key: value for key, value in state.items()}}, tmp_path / "c.pth")
    done = run("inspect", "timm:test_resnet", "--checkpoint", tmp_path / "c.pth")
    assert done.exit_code == 1
    assert done.stderr.strip().endswith("if only the classifier differs, give --num-classes 5")
