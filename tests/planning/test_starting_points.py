"""``init="auto"``: no weight that was trained is drawn anew, and what is drawn anew is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from harness import Block, noise
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

import normfree
from normfree.checkpoint import convert_file, read_header
from normfree.cli import app
from normfree.errors import UnsupportedModelError, UsageError


class Net(nn.Module):
    """A stem, a block and a classifier, with norms of the given kind."""

    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, **options)
        self.block, self.head = Block(), nn.Linear(4, 3)
        self.block.bn1, self.block.bn2 = nn.BatchNorm2d(4, **options), nn.BatchNorm2d(4, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(torch.relu(self.bn(self.stem(x)))).mean((2, 3)))


X, Y = noise(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])


def train(model: nn.Module, mode: bool = True) -> nn.Module:
    """Take a step, in eval mode if statistics are to stay where they are."""
    model.train(mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cross_entropy(model(X), Y).backward()
    optimizer.step()
    return model.eval()


def test_a_trained_shift_is_a_sign_of_training_where_statistics_are_not() -> None:
    model = train(Net(), mode=False)
    assert bool((model.bn.running_mean == 0).all())
    assert normfree.plan(model).init == "preserve"
    with torch.no_grad():
        assert torch.allclose(normfree.convert(model)(X), model(X), atol=1e-5)


def test_a_trained_network_without_statistics_is_refused_and_not_drawn_anew() -> None:
    with pytest.raises(UnsupportedModelError, match=r"nothing to preserve.*init='skipinit', which draws the weights"):
        normfree.convert(train(Net(track_running_stats=False)))


@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}, {"affine": False}])
def test_a_fresh_network_is_told(options: dict[str, bool]) -> None:
    made = normfree.plan(Net(**options))
    assert made.init == "skipinit"
    assert str(made).splitlines()[0].endswith("alpha starts at 0, 3 weights are drawn anew")
    assert "drawn" not in str(normfree.plan(Net(**options), reset=False)).splitlines()[0]


def test_where_nothing_tells_it_is_refused() -> None:
    model = Net(affine=False, track_running_stats=False)
    with pytest.raises(UsageError, match="cannot tell whether.*init='preserve'.*init='skipinit'"):
        normfree.convert(model)
    assert normfree.plan(model, init="skipinit").init == "skipinit"


def test_a_scale_alone_tells_nothing() -> None:
    model = Net(track_running_stats=False)
    for norm in (model.bn, model.block.bn1, model.block.bn2):
        norm.bias.requires_grad_(False)
        nn.init.uniform_(norm.weight)
    with pytest.raises(UsageError, match="cannot tell"):
        normfree.plan(model)


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_checkpoint_is_never_drawn_anew_unasked(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=3).eval()
    source, out = tmp_path / "in.pth", tmp_path / "out.safetensors"
    torch.save(model.state_dict(), source)
    about = ("timm:test_resnet", "--checkpoint", source, "--num-classes", 3)
    assert "init: preserve (the weights are loaded ones)" in run("inspect", *about)
    assert "init: preserve" in run("convert", *about, "-o", out)
    x = noise(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(normfree.load(out).eval()(x), model(x), atol=1e-5)
    convert_file("timm:test_resnet", source, out, num_classes=3, overwrite=True)
    assert read_header(out).plan.init == "preserve"
    assert "init: skipinit (asked for), alpha starts at 0, 15 weights" in run("inspect", *about, "--init", "skipinit")
