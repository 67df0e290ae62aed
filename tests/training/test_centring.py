"""Calibration of a ``preserve`` model sets its coordinates from data, and leaves its function as it was."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from harness import assert_close, noise, randomise, set_alphas
from readings import plan_of
from torch import nn
from torch.nn import functional as F

import normfree
from normfree.errors import CheckpointError, UsageError
from normfree.layers import ScaledWeight, shift
from normfree.planning.deciding import UNITS
from normfree.training.centring import mean_patch

NAMES = ["test_resnet", "test_efficientnet", "resnetv2_18"]


@pytest.fixture(scope="module", params=NAMES)
def converted(request: pytest.FixtureRequest) -> nn.Module:
    model = randomise(timm.create_model(request.param, num_classes=4)).double()
    return normfree.convert(model, init="preserve").eval()


X = noise(6, 3, 64, 64, dtype=torch.float64) * 2 + 1


def test_the_function_stays_and_inputs_are_centred(converted: nn.Module) -> None:
    model = normfree.calibrate(converted, X)
    assert_close(model(X), converted(X), 1e-10)
    centred = {layer.path: model.get_submodule(layer.path) for layer in plan_of(model).carried if layer.centred}
    seen = {}
    for path, layer in centred.items():
        layer.register_forward_pre_hook(lambda _, a, path=path: seen.update({path: a[0]}))
    with torch.no_grad():
        model(X)
    for path, layer in centred.items():
        assert_close(layer.center, mean_patch(layer, seen[path]), 1e-10)
    assert any(not torch.equal(layer.center, converted.get_submodule(path).center) for path, layer in centred.items())


def test_the_function_stays_what_was_learnt(converted: nn.Module) -> None:
    """A layer without a bias holds some of it across the mean that it has, and would lose it with another."""
    model = set_alphas(copy.deepcopy(converted), 0.7)
    with torch.no_grad():
        for layer in plan_of(model).carried:
            weight = model.get_submodule(layer.path).weight
            weight.add_(noise(*weight.shape, dtype=torch.float64) * weight.abs().mean() / 4)
    calibrated = normfree.calibrate(model, X)
    assert_close(calibrated(X), model(X), 1e-10)


def test_layers_without_a_bias_are_centred_and_stay_without_one() -> None:
    """As those that end a branch of a pre-activation network: what they make of the mean they go on making."""
    model = normfree.convert(randomise(timm.create_model("resnetv2_18")).double(), init="preserve")
    ends = [model.get_submodule(layer.path) for layer in plan_of(model).carried if layer.path.endswith(".conv2")]
    assert ends
    for layer in ends:
        assert layer.bias is None
        assert bool(layer.center.any())
        mean = layer.center.reshape(1, *layer.weight.shape[1:])
        layer.weight.data.add_(noise(*layer.weight.shape, dtype=torch.float64))
        weight, bias = layer.combined()
        assert bias is None
        assert_close((weight * mean).flatten(1).sum(1), layer.at_center * layer.gain * layer.alpha, 1e-10)


def test_the_mean_patch_is_the_mean_of_unfolded_patches() -> None:
    layer, x = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), noise(3, 4, 7, 7) + 1
    patches = F.unfold(x, 3, padding=1, stride=2).mean((0, 2)).reshape(2, -1)
    assert_close(mean_patch(layer, x), patches, 1e-6)
    linear, tokens = nn.Linear(4, 3), noise(2, 5, 4) + 1
    assert_close(mean_patch(linear, tokens), tokens.mean((0, 1))[None], 1e-6)


def test_what_is_learnt_is_not_moved_and_batches_are_averaged(converted: nn.Module) -> None:
    halves = normfree.calibrate(converted, [X[:3], X[3:]])
    whole = normfree.calibrate(converted, X)
    for layer in plan_of(whole).carried:
        if layer.centred:
            one, other = halves.get_submodule(layer.path), whole.get_submodule(layer.path)
            assert_close(one.center, other.center, 1e-10)
            factor = other.weight / converted.get_submodule(layer.path).weight
            assert layer.head or torch.equal(factor, torch.ones_like(factor))


def test_a_head_that_was_put_on_afterwards_is_taken_in_by_one_call(converted: nn.Module) -> None:
    model = copy.deepcopy(converted)
    model.reset_classifier(7)
    model = model.double()
    assert not isinstance(model.get_classifier(), ScaledWeight)
    taken = normfree.calibrate(model, X)
    head = taken.get_classifier()
    assert isinstance(head, ScaledWeight)
    assert_close(taken(X), model(X), 1e-10)
    path = next(name for name, module in taken.named_modules() if module is head)
    said, layers = plan_of(taken).calibrated, sum(layer.centred for layer in plan_of(taken).carried)
    assert said == f"{layers} of {layers} inputs centred, input of {path} over {1 / float(head.gain[0]):g}"
    assert f"calibrated: {said}" in str(plan_of(taken))
    inputs = []
    head.register_forward_pre_hook(lambda _, a: inputs.append(a[0]))
    with torch.no_grad():
        taken(X)
    centred = inputs[0].flatten(1) - head.center
    size = centred.square().sum(1).mean().sqrt() * head.gain[0]
    assert float(size) <= 4 * 2**0.5, "what it sees has a norm of about four at most"
    assert float(head.gain[0]) == 1 or float(size) >= 4 / 2**0.5


@pytest.mark.parametrize(("norm", "unit"), [(0.0, 1), (0.5, 1), (4, 1), (5.5, 1), (6, 2), (30, 8)])
def test_what_a_head_sees_is_never_enlarged(norm: float, unit: float) -> None:
    assert UNITS["preserve"].of_head(norm) == unit


def test_a_head_that_was_put_on_afterwards_travels_in_a_file(tmp_path) -> None:
    model = normfree.convert(randomise(timm.create_model("test_resnet")), init="preserve")
    model.reset_classifier(3)
    for name, saved in (("plain", model), ("taken", normfree.calibrate(model, X.float()))):
        path = tmp_path / f"{name}.safetensors"
        normfree.save(saved, path, source="timm:test_resnet", num_classes=3)
        loaded = normfree.load(path).eval()
        assert torch.equal(loaded(X.float()), saved.eval()(X.float()))
        assert isinstance(loaded.fc, ScaledWeight) == (name == "taken")


def test_what_is_made_of_centres_is_added_again(converted: nn.Module) -> None:
    for layer in plan_of(converted).carried:
        module = converted.get_submodule(layer.path)
        if layer.centred:
            assert torch.equal(module.at_center, shift(module.weight, module.center))


def test_what_cannot_be_calibrated_says_so() -> None:
    model = normfree.convert(randomise(timm.create_model("test_resnet", num_classes=2)), init="preserve")
    with pytest.raises(UsageError, match="no layer was reached: there is no batch"):
        normfree.calibrate(model, [])
    with pytest.raises(UsageError, match="its input is not finite"):
        normfree.calibrate(model, torch.full((2, 3, 64, 64), float("nan")))
    with pytest.raises(UsageError, match="is fused, and learns in plain coordinates"):
        normfree.calibrate(normfree.fuse(model), X.float())


def test_constants_move_and_load_with_the_model_and_are_no_buffers(converted: nn.Module) -> None:
    assert not list(converted.buffers())
    half = copy.deepcopy(converted).half()
    assert {value.dtype for value in half.state_dict().values()} == {torch.float16}
    other = copy.deepcopy(converted)
    moved = {key: value + 1 for key, value in converted.state_dict().items()}
    assert other.load_state_dict(moved) == ([], [])
    assert all(torch.equal(value, moved[key]) for key, value in other.state_dict().items())
    key = next(key for key in moved if key.endswith(".center"))
    with pytest.raises(RuntimeError, match=f"Missing key.*{key}"):
        other.load_state_dict({name: value for name, value in moved.items() if name != key})
    with pytest.raises(RuntimeError, match=f"size mismatch for {key}"):
        other.load_state_dict({**moved, key: moved[key][:, 1:]})


def test_files_of_the_earlier_form_are_refused_in_one_line(tmp_path) -> None:
    import json

    import safetensors.torch

    path = tmp_path / "old.safetensors"
    normfree.save(normfree.convert(timm.create_model("test_resnet"), init="skipinit"), path, source="timm:test_resnet")
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["normfree"])
    header["format"] = 2
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, {"normfree": json.dumps(header)})
    with pytest.raises(CheckpointError, match="format 2, in which gain and bias were on the layers in front") as caught:
        normfree.load(path)
    assert "\n" not in str(caught.value)
