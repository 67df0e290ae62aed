"""``torch.compile``: one graph, as few compilations as the bare network needs, and the same gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from endings import X, converted, ends
from harness import Block, assert_close, both, noise, randomise, set_alphas
from marks import broad
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import normfree
from normfree import zoo
from normfree.norms import describe, find_norms
from normfree.tracing.copying import deep_copy


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def bare(model: nn.Module) -> nn.Module:
    """Return a copy with every norm deleted: what a converted model may not be slower to compile than."""
    model = deep_copy(model)
    for name in find_norms(model):
        norm = describe(model.get_submodule(name))
        model.set_submodule(name, nn.Sequential(*(part for part in (norm.drop, norm.act) if part is not None)))
    return model


def compilations(model: nn.Module, x: Tensor, modes: str = "train eval train eval") -> int:
    """Train and evaluate in turn, and return how many graphs were compiled for it; more than one a call raises."""
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for mode in modes.split():
        model.train(mode == "train")
        with torch.set_grad_enabled(mode == "train"):
            out = compiled(x)
        if mode == "train":
            out.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not counters["graph_break"]
    return int(counter.frame_count)


class WithNormAct(nn.Module):
    """Pads by itself, and has norms with activations: both are other classes than torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = Conv2dSame(4, 4, 3, bias=False), BatchNormAct2d(4)
        self.conv2, self.bn2 = Conv2dSame(4, 4, 3, bias=False), BatchNormAct2d(4, apply_act=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn2(self.conv2(self.bn1(self.conv1(x))))


class Sliced(nn.Module):
    """Adds a range of its channels only: alpha scales a part of the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 7, 3, padding=1), nn.BatchNorm2d(7)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return torch.cat([x + y[:, :4], y[:, 4:]], 1)


NETWORKS = {
    "slice": lambda: nn.Sequential(Block(), Sliced()),
    "block": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), Block(), Block()),
    "dropout": lambda: nn.Sequential(Block(), nn.Dropout(0.5), Block()),
    "norm and activation": lambda: nn.Sequential(WithNormAct(), WithNormAct()),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3, 2, groups=2), nn.BatchNorm2d(4), Block()),
    "linear": lambda: nn.Sequential(Block(), nn.Flatten(), nn.Linear(144, 8), nn.BatchNorm1d(8), nn.ReLU()),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_no_more_compilations_than_the_bare_network(name: str) -> None:
    model = randomise(NETWORKS[name]())
    expected = compilations(bare(model), noise(*X))
    for init in ("skipinit", "preserve"):
        torch._dynamo.reset()
        assert compilations(normfree.convert(model, init=init, inputs=noise(*X)), noise(*X)) == expected, init


@both
def test_switching_between_training_and_evaluation_compiles_nothing_anew(init: str) -> None:
    model = set_alphas(normfree.convert(randomise(NETWORKS["block"]()), init=init), 0.5)
    x = noise(*X)
    one_mode = compilations(model, x, "train train")
    torch._dynamo.reset()
    assert one_mode == 1
    compiled = torch.compile(model, backend=(counter := CompileCounterWithBackend("eager")), fullgraph=True)
    for mode in (True, False, True, False):
        compiled_out = compiled.train(mode)(x)
        assert_close(compiled_out, model.train(mode)(x), 1e-6)
    assert counter.frame_count == 1


@pytest.mark.parametrize("source", ["timm:test_resnet", *broad("torchvision:resnet18", "timm:tf_efficientnet_lite0")])
def test_real_networks_compile_into_one_graph_for_each_mode(source: str) -> None:
    model = zoo.build(zoo.find(source))
    x = torch.randn(2, 3, 64, 64)
    expected = compilations(bare(model), x)
    for init in ("skipinit", "preserve"):
        torch._dynamo.reset()
        assert compilations(normfree.convert(model, init=init), x) <= expected, init


@pytest.mark.parametrize("init", ["preserve", *broad("skipinit")])  # which has no gain, and nothing else
@ends
def test_compiled_gradients_are_the_same(end: str, init: str) -> None:
    model, x = converted(end, init).train(), noise(*X)
    model(x).square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
