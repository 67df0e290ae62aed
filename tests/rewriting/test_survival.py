"""What a user does with a model afterwards must work on a converted one; and the original stays as it was."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from endings import Block, X, converted, ends, make
from harness import assert_close, both, noise, prove, randomise, set_alphas
from readings import alphas
from torch import Tensor, nn

import normfree
from normfree.layers import ChannelAffine, scaled_weight_class


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # noqa: S301  # our own bytes


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@both
@ends
@pytest.mark.parametrize("again", [copy.deepcopy, by_pickle, by_torch_save], ids=["deepcopy", "pickle", "torch.save"])
def test_copy_is_the_same_model_and_shares_nothing(again: Any, end: str, init: str) -> None:
    model = converted(end, init)
    other = again(model)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(other(noise(*X)), model(noise(*X)))
    set_alphas(other, 0.0)
    assert not torch.equal(other(noise(*X)), model(noise(*X)))
    assert normfree.verify(other, inputs=noise(*X)).ok


@both
@ends
def test_state_dict_loads_into_another_conversion(end: str, init: str) -> None:
    model, other = converted(end, init), normfree.convert(randomise(make(end), seed=5), init=init).eval()
    assert not torch.equal(other(noise(*X)), model(noise(*X)))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(other(noise(*X)), model(noise(*X)))


@both
@ends
def test_model_compiles_into_one_graph(end: str, init: str) -> None:
    model = converted(end, init)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert_close(compiled(noise(*X)), model(noise(*X)), 1e-6)
    torch._dynamo.reset()


@both
@ends
@pytest.mark.parametrize("how", ["fx", "export"])
def test_model_that_could_be_traced_can_still_be_traced(how: str, end: str, init: str) -> None:
    model = converted(end, init)
    with torch.no_grad():
        if how == "fx":
            torch.fx.symbolic_trace(make(end))  # the original can be
            traced = torch.fx.symbolic_trace(model)
        else:
            traced = torch.export.export(model, (noise(*X),)).module()
        assert_close(traced(noise(*X)), model(noise(*X)), 1e-6)


@both
@ends
def test_half_precision_and_channels_last_stay_what_they_are(end: str, init: str) -> None:
    model = converted(end, init)
    expected = model(noise(*X))
    strided = copy.deepcopy(model).to(memory_format=torch.channels_last)
    out = strided(noise(*X).to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_close(out, expected, 1e-5)
    half = copy.deepcopy(model).half()(noise(*X).half())
    assert half.dtype == torch.float16
    assert_close(half.float(), expected, 0.02)


@ends
def test_conversion_commutes_with_deepcopy_and_with_double(end: str) -> None:
    model = make(end).eval()
    x = noise(*X)
    one = normfree.convert(model, init="preserve")
    copied = normfree.convert(copy.deepcopy(model), init="preserve")
    assert torch.equal(one(x), copied(x))
    double = normfree.convert(copy.deepcopy(model).double(), init="preserve")
    assert_close(double(x.double()), copy.deepcopy(one).double()(x.double()), 1e-6)
    assert list(double.state_dict()) == list(one.state_dict())


@both
@ends
def test_converted_in_place_is_the_same_object_with_the_same_weights_in_it(end: str, init: str) -> None:
    model = make(end)
    kept = {name: p for name, p in model.named_parameters() if name.endswith("weight") and p.dim() == 4}
    conv = model[0]
    assert normfree.convert_(model, init=init) is model
    assert model[0] is conv
    assert all(dict(model.named_parameters())[name] is p for name, p in kept.items())


@both
@ends
def test_conversion_leaves_its_input_bit_for_bit(end: str, init: str) -> None:
    model = make(end).train()
    model[1].eval()
    state = copy.deepcopy(model.state_dict())
    modules = [(name, id(m), type(m), m.training) for name, m in model.named_modules()]
    parameters = [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()]
    other = normfree.convert(model, init=init)
    assert [(name, id(m), type(m), m.training) for name, m in model.named_modules()] == modules
    assert [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()] == parameters
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}


@both
def test_hooks_on_containers_and_on_the_norm_itself_still_run(init: str) -> None:
    model = make("weight")
    seen: list[str] = []
    model.register_forward_hook(lambda *_: seen.append("root"))
    model[2].register_forward_pre_hook(lambda *_: seen.append("block"))
    model[2].bn.register_forward_hook(lambda *_: seen.append("folded norm"))
    model[2].pre.register_forward_hook(lambda *_: seen.append("norm"))
    model[2].conv.register_full_backward_hook(lambda *_: seen.append("backward"))
    normfree.plan(model)
    assert seen == []
    normfree.convert_(model, init=init)
    assert seen == []
    model(noise(*X)).sum().backward()
    assert seen == ["block", "norm", "folded norm", "root", "backward"]


@both
def test_hook_can_be_removed_by_its_handle_after_an_in_place_conversion(init: str) -> None:
    model = make("weight")
    seen: list[str] = []
    handle = model[2].bn.register_forward_hook(lambda *_: seen.append("norm"))
    normfree.convert_(model, init=init)
    handle.remove()
    model(noise(*X))
    assert seen == []


@both
def test_verification_leaves_both_models_as_they_were(init: str) -> None:
    model = make("output")
    other = prove(model, noise(*X), init=init)
    before = copy.deepcopy((model.state_dict(), other.state_dict()))
    ran: list[nn.Module] = []
    for module in (model[0], other[0]):
        module.register_forward_hook(lambda hooked, *_: ran.append(hooked))
    assert normfree.verify(other, model, noise(*X)).ok
    for state, module in zip(before, (model, other), strict=True):
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
        assert all(p.grad is None for p in module.parameters())
    assert ran, "what a user's hook changes is a part of what the model computes"
    assert not {id(hooked) for hooked in ran} & {id(model[0]), id(other[0])}, "only copies run"


class Jitter(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)


@pytest.mark.parametrize("layer", [Jitter, nn.RReLU, lambda: nn.Dropout(0.5)], ids=["own", "RReLU", "Dropout"])
def test_plan_and_preserve_draw_no_random_numbers(layer: Any) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), layer(), nn.Conv2d(4, 4, 1)))
    before = torch.get_rng_state()
    normfree.plan(model, init="skipinit")
    normfree.convert(model, init="preserve")
    assert torch.equal(torch.get_rng_state(), before)


@both
def test_model_on_the_meta_device_converts_without_memory(init: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), Block(nn.Conv2d(4, 4, 1)))
    other = normfree.convert(model, init=init)
    assert {p.device.type for p in other.parameters()} == {"meta"}
    assert len(alphas(other)) == 1
    assert other(torch.empty(*X, device="meta")).shape == X


def test_optimizer_step_moves_every_parameter_of_a_converted_model() -> None:
    model = normfree.convert(make("weight"), init="preserve").train()
    assert isinstance(model[0], scaled_weight_class(nn.Conv2d))
    assert isinstance(model[2].pre, ChannelAffine)
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(noise(*X)).square().sum().backward()
    optimizer.step()
    unmoved = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert unmoved == []
