"""Mixed precision: a converted model has the dtypes of its original, and computes what plain weights would."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from endings import X, converted, ends, make
from harness import assert_close, both, noise, randomise, set_alphas
from readings import watched_pairs
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

import normfree
from normfree.deployment.plain import plain_
from normfree.layers import ScaledWeight
from normfree.layers.pairs import merged
from normfree.rewriting.changing import become

halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def output_dtypes(model: nn.Module, x: Tensor, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return what every module returns under autocast; a module that is not called is not there."""
    seen: dict[str, torch.dtype] = {}
    handles = [
        module.register_forward_hook(lambda *args, name=name: seen.__setitem__(name, args[2].dtype))
        for name, module in model.named_modules()
    ]
    with torch.autocast("cpu", dtype), torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen


@both
@ends
@halves
def test_every_module_returns_the_dtype_that_the_original_one_does(dtype: torch.dtype, end: str, init: str) -> None:
    expected = output_dtypes(make(end).eval(), noise(*X), dtype)
    found = output_dtypes(converted(end, init), noise(*X), dtype)
    assert dtype in expected.values()
    assert {name: found[name] for name in expected} == expected


def with_plain_weights(model: nn.Module, pairs: dict[str, str]) -> nn.Module:
    """Return a copy in which every layer holds its combined weight and bias, and scales nothing any more."""
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if isinstance(module, ScaledWeight):
            weight, bias = (None if tensor is None else tensor.detach() for tensor in combined(plain, name, pairs))
            plain_(module)
            module.weight, module.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)
            if name in pairs:
                become(plain.get_submodule(pairs[name]), nn.Identity())
    return plain


def combined(model: nn.Module, name: str, pairs: dict[str, str]) -> tuple[Tensor, Tensor | None]:
    """Return the weight and the bias with which a layer computes, with the slot behind it or alone."""
    layer = model.get_submodule(name)
    return layer.combined(merged(layer, model.get_submodule(pairs[name])) if name in pairs else None)


@both
@halves
@pytest.mark.parametrize("name", ["test_resnet", pytest.param("resnet18", marks=pytest.mark.broad)])
def test_resnet_computes_and_learns_as_with_plain_weights(name: str, dtype: torch.dtype, init: str) -> None:
    original = timm.create_model(name, num_classes=10, zero_init_last=False)
    branches = sum(type(module) in (BasicBlock, Bottleneck) for module in original.modules())
    model = set_alphas(normfree.convert(original, init=init).train(), 0.5)
    x = noise(2, 3, 32, 32)
    with watched_pairs(model) as pairs, torch.no_grad():
        model(x)
    plain = with_plain_weights(model, pairs)
    with torch.autocast("cpu", dtype):
        found, expected = model(x), plain(x)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    found.float().square().mean().backward()
    expected.float().square().mean().backward()
    again = copy.deepcopy(model)
    again.zero_grad()
    for name, module in again.named_modules():
        if isinstance(module, ScaledWeight):  # how the gradients of the plain ones follow on to what they are made of
            theirs, made = plain.get_submodule(name), combined(again, name, pairs)
            torch.autograd.backward(made, (theirs.weight.grad, None if made[1] is None else theirs.bias.grad))
    checked = 0
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), name
        followed = again.get_parameter(name).grad
        assert_close(parameter.grad, plain.get_parameter(name).grad if followed is None else followed, 1e-6)
        checked += followed is not None
    assert checked >= 3 * branches >= 12  # weight, bias and alpha of every branch at least


@both
@pytest.mark.parametrize("name", ["test_resnet", "resnetv2_18"])
def test_compiled_it_computes_in_half_precision_what_it_does_without(name: str, init: str) -> None:
    original = randomise(timm.create_model(name, num_classes=10))
    model = set_alphas(normfree.convert(original, init=init).train(), 0.5)
    free = [m for m in model.modules() if isinstance(m, ScaledWeight) and m.bias is None and not m.feeds_slot]
    assert bool(free) == (name == "resnetv2_18"), "layers without a bias are centred in another way"
    torch._dynamo.reset()
    compiled, x = torch.compile(model, backend="aot_eager"), noise(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = compiled(x), model(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert_close(found.float(), expected.float(), 2e-2)


@both
@ends
def test_scaled_gradients_come_back_as_they_are(end: str, init: str) -> None:
    model, x = converted(end, init).train(), noise(*X)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with torch.autocast("cpu", torch.float16):
        loss = model(x).float().square().mean()
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with torch.autocast("cpu", torch.float16):
        loss = model(x).float().square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for name, parameter in model.named_parameters():
        # A small gradient has few bits left without the scale.
        assert (parameter.grad - expected[name]).norm() <= 2e-2 * expected[name].norm(), name
    before = copy.deepcopy(model.state_dict())
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name, gradient in expected.items() if gradient.any()}
    assert any(name.endswith("alpha") for name in moved)
