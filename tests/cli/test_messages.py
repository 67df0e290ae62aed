"""What the command line says when something is wrong: in one line, in its own words, with the right exit code."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
from typer.testing import CliRunner, Result

from normfree.cli import app

OWN = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=4):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.one, self.first, self.two, self.second = (
            nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        )
        self.head = nn.Linear(4, num_classes)
        print("built")

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        x = x + self.second(self.two(self.first(self.one(x)).relu()))
        return self.head(x.mean((2, 3)))

class Broken(Net):
    def forward(self, x):
        raise RuntimeError("it is broken")

def number(): return 3
def fails(): raise ValueError("no luck\\nand more")
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "normfree_test_models.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


MINE = "normfree_test_models"
SMALL = ("--batch", 2, "--size", 16)
COUNTED = (*SMALL, "--runs", 0, "--arms", "bn,normfree")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("inspect", "torchvision:resnet19"), 2, "torchvision has no model 'resnet19'; did you mean resnet1"),
        (("inspect", "torchvision:resnetv2_50"), 2, "timm has: write timm:resnetv2_50"),
        (("inspect", "timm:regnet_y_400mf"), 2, "torchvision has: write torchvision:regnet_y_400mf"),
        (("inspect", "timm:test_resnet", "--init", "foo"), 2, "--init is 'foo'; it must be"),
        (("inspect", "timm:test_resnet", "--scope", "foo"), 2, "--scope is 'foo'; it must be"),
        (("inspect", "timm:test_resnet", "--exclude", "*"), 1, "--include, --exclude and --scope leave none"),
        (("convert", f"{MINE}:Net", "-o", "x.safetensors"), 2, "`inspect`, `signals` and `bench` take package.module"),
        (("inspect", f"{MINE}:Nett"), 2, f"{MINE}:Nett cannot be built: AttributeError"),
        (("inspect", f"{MINE}:number"), 2, "returns a int, and no torch.nn.Module"),
        (("inspect", f"{MINE}:Net", "--pretrained"), 2, "--pretrained is for models of torchvision and timm"),
        (("inspect", f"{MINE}.py"), 2, "is a file: name the architecture that it is of, and give the file by --check"),
        (("signals", f"{MINE}:Net", "--plot", "x.foo"), 2, "--plot x.foo: a picture ends in one of"),
        (("signals", f"{MINE}:Net", "--plot", "no/x.png"), 2, "no/x.png: the folder no does not exist"),
        (("bench", f"{MINE}:Net", "--plot", "x.foo"), 2, "--plot x.foo: a picture ends in one of"),
        (("bench", f"{MINE}:Net", "--csv", "no/x.csv"), 2, "no/x.csv: the folder no does not exist"),
        (("bench", f"{MINE}:Net", "--dtype", "foo"), 2, "--dtype is 'foo'; it must be one of fp32"),
        (("bench", f"{MINE}:Net", "--device", "foo"), 2, "--device is 'foo'; it must be cpu or cuda"),
        (("signals", "torchvision:vgg11_bn", *SMALL, "--size", 32), 2, "no residual sum of this VGG ran"),
        (("export", "no.safetensors", "-o", "x.foo"), 2, "x.foo: the name of a program ends in .pt2 or .onnx"),
        (("export", "no.safetensors", "-o", "x.pt2"), 1, "no.safetensors: no such file"),
    ],
)
def test_one_line_and_an_exit_code(arguments: tuple[object, ...], code: int, message: str) -> None:
    done = run(*arguments)
    said = [line for line in done.stderr.splitlines() if line.strip() and line != "built"]
    assert len(said) == 1
    assert said[0].startswith("error: ")
    assert message in said[0]
    assert (done.exit_code, done.stdout) == (code, "")


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.filterwarnings("ignore::normfree.errors.UnseenWarning")
def test_an_error_of_the_models_own_is_told_with_its_place(as_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("bench", f"{MINE}:Broken", *COUNTED, *(["--json"] if as_json else []))
    assert done.exit_code == 1
    said = json.loads(done.stdout)["message"] if as_json else done.stderr.strip().splitlines()[-1]
    assert "RuntimeError: it is broken (" in said
    assert f"{MINE}.py:" in said
    monkeypatch.setenv("NORMFREE_TRACEBACK", "1")
    assert isinstance(run("bench", f"{MINE}:Broken", *COUNTED).exception, RuntimeError)


def test_a_warning_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("warnings.filters", [])
    done = run("bench", f"{MINE}:Broken", *COUNTED)
    assert done.stderr.count("warning: 3 of 3 norms went unseen") >= 1
    assert "Pass --size with which it runs" in done.stderr
    assert "UnseenWarning" not in done.stderr


@pytest.mark.parametrize("command", ["signals", "bench", "inspect"])
def test_a_class_of_ones_own_with_a_number_of_classes(command: str) -> None:
    more = {"signals": SMALL, "bench": COUNTED, "inspect": ()}[command]
    done = run(command, f"{MINE}:Net", "--num-classes", 7, *more, "--json")
    assert done.exit_code == 0, done.output
    json.loads(done.stdout)
    assert "built" in done.stderr, "what it prints is no part of the JSON"


def test_weights_that_cannot_be_reached_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        print("Downloading ...")  # noqa: T201  # as torch.hub does
        logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s")
        raise OSError("An error happened. Please check your connection\nand more")

    monkeypatch.setattr(timm, "create_model", unreachable)
    for command in (("inspect",), ("convert", "-o", "x.safetensors")):
        done = run(*command, "timm:test_resnet", "--pretrained")
        said = [line for line in done.stderr.splitlines() if line.strip()]
        assert said == [
            "error: the pretrained weights of timm:test_resnet cannot be had: OSError: An error happened"
        ], done.stderr
        assert (done.exit_code, done.stdout) == (1, "")


def test_an_existing_file_and_a_missing_size_name_the_options_only(tmp_path: Path) -> None:
    assert run("convert", "timm:test_resnet", "-o", "x.safetensors").exit_code == 0
    done = run("convert", "timm:test_resnet", "-o", "x.safetensors")
    assert done.stderr.strip().endswith("x.safetensors exists already; say --force to replace it")
    for arguments in (("fuse",), ("restore",)):
        done = run(*arguments, "x.safetensors", "-o", "x.safetensors", "--force")
        assert "is the input" in done.stderr
    done = run("restore", "x.safetensors", "-o", "y.safetensors")
    assert "was converted with --init skipinit, which keeps nothing of the norms" in done.stderr
    assert run("fuse", "x.safetensors", "-o", "f.safetensors").exit_code == 0
    done = run("fuse", "f.safetensors", "-o", "g.safetensors")
    assert (done.exit_code, "is fused already" in done.stderr) == (2, True)
