"""Memory: channels_last is kept through weights and gradients, and recomputed blocks give the same gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from endings import X, converted, ends
from harness import both, noise, randomise, set_alphas
from test_carriers import LAYERS, RANGE, carrying
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normfree

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
IMAGES = [name for name, layer in LAYERS.items() if len(layer.shape) in LAST and layer.make is not nn.Linear]


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("carried", [(True, True, None), (False, True, None), (True, True, RANGE)])
def test_combined_weight_and_its_gradient_are_channels_last(
    name: str, carried: tuple[bool, bool, tuple[int, int] | None]
) -> None:
    layer = LAYERS[name]
    form = LAST[len(layer.shape)]
    scaled = carrying(layer.build(bias=True), *carried).to(memory_format=form)
    weight, _ = scaled.combined()
    weight.sum().backward()
    for tensor in (scaled.weight, weight, scaled.weight.grad):
        assert tensor.is_contiguous(memory_format=form)


def strided(model: nn.Module, x: Tensor) -> dict[str, bool]:
    """Return of every module whether its output is channels_last in a model and for an input that are."""
    seen: dict[str, bool] = {}
    model = model.to(memory_format=torch.channels_last)

    def look(name: str, out: Tensor) -> None:
        if out.dim() == 4:
            seen[name] = out.is_contiguous(memory_format=torch.channels_last)

    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, out, name=name: look(name, out))
    model(x.to(memory_format=torch.channels_last)).square().mean().backward()
    return seen


@both
def test_resnet_stays_channels_last_throughout(init: str) -> None:
    model = set_alphas(normfree.convert(torchvision.models.resnet18(num_classes=10), init=init), 0.5)
    seen = strided(model, noise(2, 3, 64, 64))
    assert len(seen) > 60
    assert [name for name, kept in seen.items() if not kept] == []
    weights = [p for p in model.parameters() if p.dim() == 4]
    assert len(weights) == 20
    assert all(p.grad.is_contiguous(memory_format=torch.channels_last) for p in weights)


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    run(x).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@both
@ends
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_give_the_same_gradients(reentrant: bool, end: str, init: str) -> None:
    model, x = converted(end, init).train(), noise(*X).requires_grad_()
    expected = gradients(model, model, x)
    again = gradients(model, functools.partial(checkpoint, model, use_reentrant=reentrant), x)
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], gradient) for name, gradient in expected.items())


@both
@pytest.mark.parametrize("source", ["resnet10t", "tf_efficientnet_lite0"])
def test_checkpointing_of_timm_gives_the_same_gradients(source: str, init: str) -> None:
    model = timm.create_model(source, num_classes=3, drop_rate=0.0, drop_path_rate=0.0)
    model = set_alphas(normfree.convert(randomise(model), init=init), 0.5).train()
    x, calls = noise(2, 3, 64, 64), []
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    convs[len(convs) // 2].register_forward_hook(lambda *_: calls.append("called"))
    expected = gradients(model, model, x)
    assert len(calls) == 1
    model.set_grad_checkpointing()
    again = gradients(model, model, x)
    assert len(calls) == 3  # once more in the backward pass
    assert all(torch.equal(again[name], gradient) for name, gradient in expected.items())


@both
@ends
def test_a_training_step_reads_no_value_as_a_cuda_graph_requires(end: str, init: str) -> None:
    model = converted(end, init).train().to("meta")  # there, whatever reads a value raises
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(noise(*X).to("meta")).square().mean().backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())
    with pytest.raises(RuntimeError, match="meta"):
        next(model.parameters()).sum().item()
