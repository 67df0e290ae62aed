"""Exported programs are for the size that a network was made for, and say so; or for any size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from harness import Block, noise, randomise
from torch import nn
from typer.testing import CliRunner

import normfree
from normfree import zoo
from normfree.checkpoint import read_header
from normfree.cli import app
from normfree.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's, of itself


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return done.stdout


def shape(path: Path) -> list[Any]:
    program = torch.export.load(path)
    given = next(n for n in program.graph.nodes if n.name == program.graph_signature.user_inputs[0])
    return [dim if isinstance(dim, int) else None for dim in given.meta["val"].shape]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "r.safetensors"
    model = randomise(timm.create_model("test_resnet", num_classes=3))
    normfree.save(normfree.convert(model, init="preserve"), path)
    return path


def test_the_command_takes_the_networks_own_size_and_says_it(file: Path, tmp_path: Path) -> None:
    own = timm.create_model("test_resnet").pretrained_cfg["input_size"]
    assert own == (3, 160, 160)
    assert f"input (N, {', '.join(map(str, own))})" in run("export", file, "-o", tmp_path / "a.pt2")
    assert shape(tmp_path / "a.pt2") == [None, *own]
    told = json.loads(run("export", file, "-o", tmp_path / "b.pt2", "--size", 64, "--json"))
    assert told["input"] == ["N", 3, 64, 64]
    assert shape(tmp_path / "b.pt2") == [None, 3, 64, 64]


def test_a_size_that_the_file_says(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", pretrained_cfg_overlay={"input_size": (3, 96, 96)})
    normfree.save(normfree.convert(model), tmp_path / "a.safetensors")
    normfree.save(
        normfree.convert(timm.create_model("test_resnet")), tmp_path / "b.safetensors", input_size=(3, 48, 80)
    )
    for name, size in (("a", (3, 96, 96)), ("b", (3, 48, 80))):
        assert read_header(tmp_path / f"{name}.safetensors").input_size == size
        run("export", tmp_path / f"{name}.safetensors", "-o", tmp_path / f"{name}.pt2")
        assert shape(tmp_path / f"{name}.pt2") == [None, *size]


@pytest.mark.parametrize("ending", ["pt2", "onnx"])
def test_any_size(file: Path, tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"a.{ending}"
    told = run("export", file, "-o", out, "--dynamic-size", "--size", 64)
    assert "input (N, 3, H, W)" in told
    x = noise(3, 3, 80, 112)
    with torch.no_grad():
        expected = normfree.load(file).eval()(x)
    if ending == "pt2":
        found = torch.export.load(out).module()(x)
    else:
        import onnx
        import onnxruntime

        graph = onnx.load(out).graph
        named = {
            value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in (*graph.input, *graph.output)
        }
        assert named == {"input": ["batch", 3, "height", "width"], "output": ["batch", 3]}
        session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(["output"], {"input": x.numpy()})[0])
    assert torch.allclose(found, expected, atol=1e-4)


def test_the_library_takes_no_other_size_either(tmp_path: Path) -> None:
    model = normfree.fuse(normfree.convert(timm.create_model("test_resnet")))
    normfree.export(model, tmp_path / "a.pt2")
    assert shape(tmp_path / "a.pt2") == [None, 3, 160, 160]
    own = normfree.convert(nn.Sequential(nn.Conv2d(3, 4, 1), Block()))
    with pytest.raises(UsageError, match=r"nothing says which size this Sequential .*inputs= \(--size\)"):
        normfree.export(own, tmp_path / "b.pt2")
    normfree.export(normfree.convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))), tmp_path / "c.pt2")
    assert shape(tmp_path / "c.pt2") == [None, 3]


def test_sizes_of_torchvision() -> None:
    assert zoo.own_shape(nn.Identity(), zoo.find("torchvision:inception_v3")) == (3, 299, 299)
    assert zoo.own_shape(torchvision.models.resnet18()) == (3, 224, 224)
    assert zoo.own_shape(torchvision.models.efficientnet_b0()) is None, "the others of its class have other sizes"
    assert zoo.own_shape(nn.Identity(), zoo.find("torchvision:fasterrcnn_resnet50_fpn")) is None
