"""Every promise, on residual networks that hypothesis puts together at random.

The default run takes the same few every time, ``-m broad`` the same five hundred from each starting point, and
``-m broad --hypothesis-profile=search --hypothesis-seed=1`` others. A failure prints the description of the smallest
network that fails; ``hold(description, init)`` replays it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from harness import assert_close, both
from hypothesis import Phase, assume, given, settings
from random_networks import Network, without_dropout
from random_strategies import networks
from readings import plan_of
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision.ops import FrozenBatchNorm2d

import normfree
from normfree.errors import AlreadyConvertedError, NoNormError, UnsupportedModelError

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d, BatchNormAct2d, FrozenBatchNormAct2d)
Init = Literal["skipinit", "preserve"]
# SWITCH: a layer without children is probed in its current mode, so that train() and eval() give other plans.
PLAN_DEPENDS_ON_MODE = False
pytestmark = pytest.mark.filterwarnings("ignore::normfree.conversion.FrozenWarning")  # some layers are frozen


@both
@settings(max_examples=15, phases=[Phase.generate])
@given(network=networks())
def test_every_random_network_keeps_every_promise(network: Network, init: Init) -> None:
    assume(trains(network))
    hold(network, init)


@pytest.mark.broad
@both
@settings(max_examples=500)
@given(network=networks())
def test_a_thousand_random_networks_keep_every_promise(network: Network, init: Init) -> None:
    assume(trains(network))
    hold(network, init)


def hold(network: Network, init: Init) -> None:
    """Hold the conversion of one network to everything that normfree promises."""
    model, x = network.build(), network.inputs()
    refusal = refused(network, model, init)
    if refusal is not None:
        before = fingerprint(model)
        with pytest.raises(refusal):
            normfree.convert(model, init=init, inputs=x)
        assert fingerprint(model) == before
        return
    before, state = fingerprint(model), copy.deepcopy(model.state_dict())
    converted = seeded(model, init, x)
    assert fingerprint(model) == before
    assert same_state(model.state_dict(), state)
    assert type(converted) is type(model)
    assert not [name for name, m in converted.named_modules() if isinstance(m, BATCH_NORMS)]
    report = normfree.verify(converted, model, x)
    failed = [proof.number for proof in report.proofs if proof.passed is False]
    dead = dead_branches(converted, x) if failed == [5] else []
    excused = dead and report.proofs[4].detail == f"alpha gets none: {', '.join(dead)}"
    assert not failed or excused, f"\n{report}\n{plan_of(converted)}"
    plan = plan_of(converted)
    assert normfree.Plan.from_json(plan.to_json()) == plan
    with pytest.raises(AlreadyConvertedError):
        normfree.convert(converted, init=init)
    hold_copies(model, converted, x, init)
    hold_function(model, converted, x, init)
    hold_samples(network, x, init)


def refused(network: Network, model: nn.Module, init: Init) -> type[Exception] | None:
    """Return the error that a network must be refused with, if it must be."""
    if network.special in ("functional", "hidden") or (network.special == "stateless" and init == "preserve"):
        return UnsupportedModelError
    return None if any(isinstance(m, BATCH_NORMS) for m in model.modules()) else NoNormError


def trains(network: Network) -> bool:
    """Whether the network works as it was written: nobody promises anything about one that does not.

    A dropout at zero returns its very input, so that what stands behind it may write where it did not before.
    """
    for model in (network.build(), without_dropout(network).build()):
        try:
            outputs = [out for out in leaves(model(network.inputs())) if out.requires_grad]
            if outputs:
                torch.autograd.backward([out.sum() for out in outputs])
            with torch.no_grad():
                if not all(out.isfinite().all() for out in leaves(model.eval()(network.inputs()))):
                    return False
        except (RuntimeError, ValueError):
            return False
    return True


def seeded(model: nn.Module, init: Init, x: Tensor) -> nn.Module:
    """Convert, always drawing the same weights."""
    torch.manual_seed(0)
    kinds = (p.dtype for p in model.parameters() if p.is_floating_point())
    return normfree.convert(model, init=init, inputs=x.to(next(kinds, x.dtype)))


def dead_branches(converted: nn.Module, x: Tensor) -> list[str]:
    """Return the carriers of alpha that move no output as things stand: behind or before activations that are off.

    In networks of four channels that happens, and it is no fault of the conversion.
    """
    model, dead = copy.deepcopy(converted).double().eval(), []
    with torch.no_grad():
        for name, alpha in model.named_parameters():
            if name.endswith(".raw_alpha"):
                kept, outputs = alpha.clone(), []
                for step in (0.0, 1e-4, -1e-4):
                    alpha.copy_(kept + step)
                    outputs.append(leaves(model(x.double())))
                alpha.copy_(kept)
                if all(torch.equal(a, b) for more in outputs[1:] for a, b in zip(outputs[0], more, strict=True)):
                    dead.append(name.removesuffix(".raw_alpha"))
    return dead


def hold_copies(model: nn.Module, converted: nn.Module, x: Tensor, init: Init) -> None:
    """Conversion commutes with deepcopy, with the mode and with the precision."""
    plan, state = plan_of(converted), converted.state_dict()
    flags = [m.training for m in converted.modules()]
    copied = seeded(copy.deepcopy(model), init, x)
    assert plan_of(copied) == plan
    assert [m.training for m in copied.modules()] == flags
    assert same_state(copied.state_dict(), state)
    for mode in (True, False):
        other = seeded(copy.deepcopy(model).train(mode), init, x)
        assert plan_of(other) == plan
        assert {m.training for m in other.modules()} == {mode}
        assert same_state(other.state_dict(), state)
    double = seeded(copy.deepcopy(model).double(), init, x)
    assert plan_of(double) == plan
    drawn = {f"{path}.{leaf}" for path, _ in plan.weights for leaf in ("weight", "bias")}
    ids = {id(p) for name, p in double.named_parameters(remove_duplicate=False) if name in drawn}
    drawn = {name for name, p in double.named_parameters(remove_duplicate=False) if id(p) in ids}
    rounded = {name: value.to(state[name].dtype) for name, value in double.state_dict().items() if name in state}
    assert list(rounded) == list(state)
    for name, value in state.items():
        assert name in drawn or torch.allclose(rounded[name], value, rtol=1e-5, atol=1e-6), name


def hold_function(model: nn.Module, converted: nn.Module, x: Tensor, init: Init) -> None:
    """``preserve`` computes what the original computes, and neither writes into an input the original leaves alone."""
    exact = copy.deepcopy(model).double().eval()
    found = seeded(exact, init, x)
    given, kept = x.double(), x.double()
    with torch.no_grad():
        expected = leaves(exact(given))
        assert all(not module.training for module in found.modules())
        outputs = leaves(found(kept))
        assert len(outputs) == len(expected)
        assert not torch.equal(given, x.double()) or torch.equal(kept, x.double()), "the input was written into"
        if init == "preserve":
            for mine, theirs in zip(outputs, expected, strict=True):
                assert_close(mine, theirs) if theirs.any() else torch.testing.assert_close(mine, theirs)


def hold_samples(network: Network, x: Tensor, init: Init) -> None:
    """With dropout off, training looks at each sample alone, and every gradient is finite."""
    model = seeded(without_dropout(network).build().double(), init, x).train()
    together = leaves(model(x.double()))
    for i in range(x.shape[0]):
        alone = leaves(model(x.double()[i : i + 1]))
        for all_samples, one in zip(together, alone, strict=True):
            atol = 1e-9 * float(all_samples.detach().abs().max())
            torch.testing.assert_close(all_samples[i : i + 1], one, rtol=1e-9, atol=atol)
    losses = [out.square().mean() for out in together if out.requires_grad]
    if losses:  # else no layer was left that learns, or ever learnt
        torch.autograd.backward(losses)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert [name for name, grad in gradients.items() if not grad.isfinite().all()] == []


def leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(value, other[name]) for name, value in one.items())


def fingerprint(model: nn.Module) -> list[object]:
    """Return what a conversion must not change of its input, the values apart."""
    return [line for name, module in model.named_modules(remove_duplicate=False) for line in lines(name, module)]


def lines(name: str, module: nn.Module) -> Iterator[object]:
    yield name, id(module), type(module), module.training, sorted(module.__dict__)
    yield getattr(module, "inplace", None), module.extra_repr()
    yield [id(item) for value in module.__dict__.values() if isinstance(value, (list, tuple)) for item in value]
    for key, hooks in module.__dict__.items():
        if key.endswith("_hooks"):
            yield key, id(hooks), [id(hook) for hook in hooks.values()]
    for key, tensor in (*module._parameters.items(), *module._buffers.items()):
        grad = None if tensor is None else tensor.grad
        yield key, id(tensor), None if tensor is None else (tensor.requires_grad, tensor.dtype), id(grad)
