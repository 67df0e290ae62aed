"""A layer and its slot compute as one what they compute one by one, and not at all as one where somebody looks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import assert_close, noise, randomise
from readings import watched_pairs
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode
from torchvision.models.feature_extraction import create_feature_extractor

import normfree
from normfree.layers.pairs import Held, held, taken

LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False), lambda: nn.BatchNorm2d(6), (4, 7, 7)),
    "conv with a bias": (lambda: nn.Conv2d(4, 6, 3), lambda: nn.BatchNorm2d(6), (4, 7, 7)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1, bias=False), lambda: nn.BatchNorm2d(6), (4, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), lambda: nn.BatchNorm2d(4), (4, 7, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), lambda: nn.BatchNorm2d(6), (4, 5, 5)),
    "one dimension": (lambda: nn.Conv1d(4, 6, 3), lambda: nn.BatchNorm1d(6), (4, 9)),
    "three dimensions": (lambda: nn.Conv3d(4, 6, 2), lambda: nn.BatchNorm3d(6), (4, 4, 4, 4)),
    "linear": (lambda: nn.Linear(4, 6), lambda: nn.BatchNorm1d(6), (4,)),
    "with an activation": (lambda: nn.Conv2d(4, 6, 3), lambda: BatchNormAct2d(6), (4, 7, 7)),
}


class Branch(nn.Module):
    """A residual branch that ends in a layer and its norm, behind a norm that tells what it meets."""

    def __init__(self, layer: nn.Module, norm: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.norm, self.width = layer, norm, width

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self.norm(y)


class Whole(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        layer, norm, _ = LAYERS[kind]
        self.branch = Branch(layer(), norm(), 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(torch.relu(x))
        return y + y.new_ones(1) if y.shape != x.shape else x + y


def converted(kind: str) -> tuple[Whole, Whole, Tensor]:
    torch.manual_seed(0)
    model, x = randomise(Whole(kind)).double().eval(), noise(3, *LAYERS[kind][2], dtype=torch.float64)
    made = normfree.convert(model, init="preserve", inputs=x)
    with torch.no_grad():
        for parameter in made.parameters():  # as training leaves them
            parameter.add_(0.1 * noise(*parameter.shape, dtype=torch.float64))
    return model, made, x


def learnt(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("narrow", [True, False], ids=["few places", "many"])
def test_both_compute_and_learn_the_same_as_one(kind: str, narrow: bool) -> None:
    _, model, x = converted(kind)
    x = x if narrow or x.dim() == 2 else F.pad(x, [8] * 2 * (x.dim() - 2))
    with watched_pairs(model) as together:
        found, grads = learnt(model, x)
    assert together == {"branch.layer": "branch.norm"}
    model.branch.layer.register_forward_hook(lambda *_: None)
    with watched_pairs(model) as together:
        expected, right = learnt(model, x)
    assert together == {}
    assert_close(found, expected, 1e-12)
    assert grads.keys() == right.keys() == dict(model.named_parameters()).keys()
    for name, grad in grads.items():
        assert_close(grad, right[name], 1e-10)


class Kept(TorchFunctionMode):
    """Keeps what convolutions return."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.conv2d or getattr(func, "__name__", "") == "conv2d":
            self.seen.append(out)
        return out


def by_a_hook(model: Any, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.branch.layer.register_forward_hook(lambda _, __, out: seen.append(out))
    model(x)
    handle.remove()
    return seen[0]


def by_a_hook_on_the_norm(model: Any, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.branch.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x)
    handle.remove()
    return seen[0]


def by_a_hook_on_every_module(model: Any, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = torch_module.register_module_forward_hook(
        lambda module, _, out: seen.append(out) if module is model.branch.layer else None
    )
    try:
        model(x)
    finally:
        handle.remove()
    return seen[0]


def by_the_gradient(model: Any, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = model.branch.norm.register_full_backward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    model(x.clone().requires_grad_()).sum().backward()
    handle.remove()
    return seen[0]


def by_a_mode(model: Any, x: Tensor) -> Tensor:
    with Kept() as kept:
        model(x)
    return kept.seen[0]


def by_a_forward_of_its_own(model: Any, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    forward = model.branch.layer.forward
    model.branch.layer.forward = lambda x: seen.append(forward(x)) or seen[-1]
    model(x)
    del model.branch.layer.forward
    return seen[0]


def by_a_class_of_its_own(model: Any, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    base = type(model.branch.layer)

    def forward(self: Any, x: Tensor) -> Tensor:
        seen.append(base.forward(self, x))  # type: ignore[attr-defined]
        return seen[-1]

    model.branch.layer.__class__ = type("Mine", (base,), {"forward": forward})
    model(x)
    model.branch.layer.__class__ = base
    return seen[0]


def by_every_call(model: Any, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    call = nn.Module.__call__

    def watched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        out = call(self, *args, **kwargs)
        if self is model.branch.layer:
            seen.append(out)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "__call__", watched)
        model(x)
    return seen[0]


def alone(model: Any, x: Tensor) -> Tensor:
    y: Tensor = model.branch.layer(torch.relu(x))
    return y


def the_norm_alone(model: Any, x: Tensor) -> Tensor:
    y: Tensor = model.branch.norm(torch.cat([x, x[:, :2]], 1))
    return y


LOOKS = (by_a_hook, by_a_hook_on_the_norm, by_a_hook_on_every_module, by_the_gradient, by_a_mode)
LOOKS += (by_a_forward_of_its_own, by_a_class_of_its_own, by_every_call, alone, the_norm_alone)


@pytest.mark.parametrize("look", LOOKS, ids=lambda look: look.__name__)
def test_whoever_looks_sees_what_the_original_shows(look: Callable[[Any, Tensor], Tensor]) -> None:
    model, _, x = converted("conv")
    made = normfree.convert(model, init="preserve", inputs=x)
    assert_close(look(made, x), look(model, x), 1e-10)
    with watched_pairs(made) as together:
        assert_close(made(x), model(x), 1e-10)
    assert together, "afterwards they compute as one again"


def test_an_image_without_a_batch_goes_the_way_of_one_by_one() -> None:
    _, model, x = converted("conv")
    with watched_pairs(model) as together, pytest.raises(RuntimeError, match="size of tensor"):
        model.branch(x[0])  # the channels are elsewhere, as a batch norm says too
    assert together == {}


def test_a_pruned_layer_computes_as_one_and_stays_pruned() -> None:
    _, model, x = converted("conv")
    prune.l1_unstructured(model.branch.layer, "weight", amount=0.5)
    one_by_one = model.branch.norm(model.branch.layer(torch.relu(x)))
    assert_close(model.branch(torch.relu(x)), one_by_one, 1e-10)


def test_another_layer_in_its_place_is_called_as_it_is() -> None:
    _, model, x = converted("conv")
    model.branch.layer = nn.Conv2d(4, 6, 3, padding=1).double()
    with watched_pairs(model) as together:
        found = model.branch(x)
    assert together == {}
    assert_close(found, model.branch.norm(model.branch.layer(x)), 1e-12)


def test_what_waits_is_called_on_what_it_was_given() -> None:
    _, model, x = converted("conv")
    waiting = held(model.branch.layer, model.branch.norm, x)
    assert isinstance(waiting, Held)
    assert_close(taken(model.branch.norm, waiting), model.branch.norm(model.branch.layer(x)), 1e-10)
    assert torch.equal(held(torch.tanh, torch.relu, x), torch.tanh(x))
    assert torch.equal(taken(torch.relu, x), torch.relu(x))


@pytest.mark.parametrize("kind", ["conv", "with an activation"])
def test_a_tracer_sees_both_one_by_one(kind: str) -> None:
    _, model, x = converted(kind)
    traced = torch.fx.symbolic_trace(model.branch)
    assert "layer" in [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert_close(traced(x), model.branch(x), 1e-12)
    assert_close(create_feature_extractor(model.branch, ["layer"])(x)["layer"], model.branch.layer(x), 1e-12)


def test_copies_and_compiled_ones_compute_as_one_too() -> None:
    _, model, x = converted("conv")
    expected, copied = model(x), copy.deepcopy(model)
    with watched_pairs(copied) as together:
        assert torch.equal(copied(x), expected)
    assert together
    torch.compiler.reset()
    assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected, 1e-12)
    torch.compiler.reset()
