"""What only a network without batch statistics can do, in float64: on small networks, and on large ones.

Data-parallel and sharded training is in ``test_distributed.py`` and ``test_distributed_networks.py``.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from harness import assert_close, noise, randomise
from marks import broad
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

import normfree
from normfree.layers import CONSTANTS

X = noise(4, 3, 32, 32, dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 1])
Gradients = dict[str, Tensor]


SMALL = [("test_resnet", "preserve"), ("mobilenetv3_small_050", "skipinit"), ("mobilenetv3_small_050", "preserve")]
LARGE = [("resnet50", "preserve"), ("efficientnet_b0", "skipinit"), ("efficientnet_b0", "preserve")]


@pytest.fixture(scope="module", params=SMALL + broad(*((case,) for case in LARGE)), ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """Return a network with batch norm, and the same without."""
    torch.manual_seed(0)
    name, init = request.param
    original = randomise(timm.create_model(name, num_classes=3)).double().train()
    return original, normfree.convert(original, init=init, alpha=0.5)  # away from zero, so that every weight matters


@pytest.fixture(scope="module")
def original(case: tuple[nn.Module, nn.Module]) -> nn.Module:
    return case[0]


@pytest.fixture(scope="module")
def model(case: tuple[nn.Module, nn.Module]) -> nn.Module:
    return case[1]


@pytest.fixture(scope="module")
def whole(model: nn.Module) -> Gradients:
    """Return the gradient of the whole batch."""
    found = gradients(model, (X, Y))
    assert all(float(gradient.abs().max()) > 0 for gradient in found.values())
    return found


def gradients(model: nn.Module, *batches: tuple[Tensor, Tensor]) -> Gradients:
    """Return the gradient of the mean loss over all batches, one backward pass each."""
    model.zero_grad()
    for x, y in batches:
        (F.cross_entropy(model(x), y, reduction="sum") / sum(len(b) for b, _ in batches)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: Gradients, expected: Gradients, tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, tolerance)


def parts(size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.split(size), Y.split(size), strict=True))


@pytest.mark.parametrize("size", [1, 2])
def test_accumulated_gradients_are_those_of_the_whole_batch(model: nn.Module, whole: Gradients, size: int) -> None:
    assert_same(gradients(model, *parts(size)), whole)


def test_accumulated_gradients_of_a_batch_norm_network_are_not(original: nn.Module) -> None:
    whole, found = gradients(copy.deepcopy(original), (X, Y)), gradients(copy.deepcopy(original), *parts(2))
    errors = [float((found[name] - g).abs().max() / g.abs().max()) for name, g in whole.items()]
    assert max(errors) > 0.1


def test_a_batch_of_one_trains(model: nn.Module, original: nn.Module) -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        copy.deepcopy(original)(X[:1])
    trained = copy.deepcopy(model)
    optimizer = torch.optim.SGD(normfree.param_groups(trained, lr=1e-3))
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(trained(X[:1]), Y[:1])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


@torch.no_grad()
def test_train_and_eval_mode_agree(model: nn.Module, original: nn.Module) -> None:
    other, batch_norm = copy.deepcopy(model).eval(), copy.deepcopy(original)
    assert torch.equal(other(X), model(X))
    assert not torch.allclose(batch_norm(X), batch_norm.eval()(X), rtol=0.1)


def test_two_forward_passes_before_one_backward_pass(model: nn.Module) -> None:
    first, second = gradients(model, (X[:2], Y[:2])), gradients(model, (X[2:], Y[2:]))
    model.zero_grad()
    one, other = model(X[:2]), model(X[2:])
    (F.cross_entropy(one, Y[:2]) + F.cross_entropy(other, Y[2:])).backward()
    both = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same(both, {name: gradient + second[name] for name, gradient in first.items()})


def test_gradients_of_every_sample_are_those_of_a_loop(model: nn.Module) -> None:
    def loss(parameters: Gradients, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, X[:2], Y[:2])
    for i in range(2):
        assert_same({name: g[i] for name, g in found.items()}, gradients(model, (X[i : i + 1], Y[i : i + 1])))


def test_checkpointing_changes_no_gradient(model: nn.Module, whole: Gradients) -> None:
    model.set_grad_checkpointing()
    try:
        saving = gradients(model, (X, Y))
    finally:
        model.set_grad_checkpointing(enable=False)
    for name, gradient in whole.items():
        assert torch.equal(saving[name], gradient), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_by_torch_changes_no_gradient(model: nn.Module, whole: Gradients, reentrant: bool) -> None:
    model.zero_grad()
    x = X.clone().requires_grad_(reentrant)  # the older way needs an input that requires a gradient
    F.cross_entropy(partial(checkpoint, model, use_reentrant=reentrant)(x), Y).backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, whole[name], 1e-12)


@torch.no_grad()
def test_an_average_of_models_has_no_statistics_to_average(model: nn.Module, original: nn.Module) -> None:
    assert any(name.endswith("running_var") for name, _ in original.named_buffers())
    assert not list(model.buffers())
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.add_(1.0)
    constants = {key for key in model.state_dict() if key.rpartition(".")[2] in CONSTANTS}
    assert model.state_dict().keys() - constants == {name for name, _ in model.named_parameters()}
    states = model.state_dict(), other.state_dict()
    other.load_state_dict({key: (value + states[1][key]) / 2 for key, value in states[0].items()})
    for mine, mean in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(mean, mine + 0.5, 1e-12)
