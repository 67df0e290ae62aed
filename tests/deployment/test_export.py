"""Out of PyTorch: programs for other runtimes, TorchScript and torch.compile of fused models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from harness import Block, assert_close, noise, randomise
from marks import broad
from torch import Tensor, nn
from typer.testing import CliRunner

import normfree
from normfree import errors
from normfree.cli import app
from normfree.errors import OutputError, UnsupportedModelError, UsageError

NAMES = ["test_efficientnet", *broad("test_resnet", "resnetv2_18d")]
pytestmark = pytest.mark.filterwarnings(
    # of torch's own exporters and of TorchScript, about themselves
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::torch.jit.TracerWarning",
)
X = noise(3, 3, 64, 64)


@pytest.fixture(scope="module", params=NAMES)
def fused(request: pytest.FixtureRequest) -> nn.Module:
    original = randomise(timm.create_model(request.param, num_classes=3))
    return normfree.fuse(normfree.convert(original, init="preserve")).eval()


@pytest.mark.parametrize("ending", ["pt2", "onnx"])
def test_a_program_for_any_batch_without_norms(fused: nn.Module, tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"model.{ending}"
    assert normfree.export(fused, out, X[:2]) < 1e-4
    assert list(tmp_path.iterdir()) == [out]
    for x in (X, X[:1]):
        with torch.no_grad():
            expected = fused(x)
        if ending == "pt2":
            program = torch.export.load(out)
            assert not [node for node in program.graph.nodes if "batch_norm" in str(node.target)]
            found = program.module()(x).detach()
        else:
            import onnx
            import onnxruntime

            operators = {node.op_type for node in onnx.load(out).graph.node}
            assert "Conv" in operators
            assert "BatchNormalization" not in operators
            session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
            found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        assert_close(found, expected, 1e-4)


def test_torchscript_and_compile(fused: nn.Module) -> None:
    with torch.no_grad():
        expected = fused(X)
        assert_close(torch.jit.trace(fused, X[:2])(X), expected, 1e-5)
        assert_close(torch.jit.script(fused)(X), expected, 1e-5)
        compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
        assert_close(compiled(X), expected, 1e-5)


def test_scripting_a_fused_model() -> None:
    fused = normfree.fuse(
        normfree.convert(randomise(nn.Sequential(nn.Conv2d(3, 4, 3), Block())), init="preserve")
    ).eval()
    with torch.no_grad():
        assert_close(torch.jit.script(fused)(X), fused(X), 1e-6)


def test_the_command_fuses_and_exports(tmp_path: Path) -> None:
    converted = normfree.convert(randomise(timm.create_model("test_resnet", num_classes=3)), init="preserve")
    file, out = tmp_path / "a.safetensors", tmp_path / "a.pt2"
    normfree.save(converted, file, source="timm:test_resnet", num_classes=3)
    done = CliRunner().invoke(app, ["export", str(file), "-o", str(out), "--json", "--size", "64"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["difference"] < 1e-4
    assert not [
        node for node in torch.export.load(out).graph.nodes if node.op == "call_function" and "mul" in str(node.target)
    ]
    again = CliRunner().invoke(app, ["export", str(file), "-o", str(out), "--size", "64"])
    assert again.exit_code == 2
    assert "--force" in again.stderr
    other = CliRunner().invoke(app, ["export", str(file), "-o", str(tmp_path / "a.pb")])
    assert other.exit_code == 2
    assert "ends in .pt2 or .onnx" in other.stderr


class Forks(nn.Module):
    """Its way depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return x if float(x.sum()) > 0 else -x


def test_what_cannot_be_exported_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    with pytest.raises(UnsupportedModelError, match="batch norms run in the exported program: "):
        normfree.export(plain, tmp_path / "a.pt2", X)
    with pytest.raises(UnsupportedModelError, match="Forks: torch.export cannot follow it"):
        normfree.export(normfree.convert(randomise(Forks())), tmp_path / "a.pt2", X)
    with pytest.raises(UsageError, match="at least two"):
        normfree.export(normfree.convert(plain), tmp_path / "a.pt2", X[:1])
    with pytest.raises(UsageError, match="a.pt2: the name of a program ends in .onnx"):
        normfree.export(normfree.convert(plain), tmp_path / "a.pt2", X, format="onnx")
    (tmp_path / "b.pt2").write_bytes(b"precious")
    with pytest.raises(OutputError, match="exists already"):
        normfree.export(normfree.convert(plain), tmp_path / "b.pt2", X)
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'normfree\[export\]'"):
        normfree.export(normfree.convert(plain), tmp_path / "a.onnx", X)
    assert [path.name for path in tmp_path.iterdir()] == ["b.pt2"]
