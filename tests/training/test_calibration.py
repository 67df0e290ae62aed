"""Calibration: unit variance and zero mean behind every layer that a norm used to rescale."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import timm
import torch
import torchvision
from harness import Block, assert_close, noise, set_alphas
from marks import broad
from small import dense
from torch import Tensor, nn

import normfree
from normfree.errors import UsageError
from normfree.training.calibration import CalibrationWarning


def outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What every layer returns that a norm used to rescale, in train mode."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(path).register_forward_hook(lambda _, __, y, path=path: seen.update({path: y.clone()}))
        for path, _ in model._normfree_plan.weights
    ]
    with torch.no_grad():
        model.train()(x)
    for handle in handles:
        handle.remove()
    return seen


def photographs() -> Tensor:
    """Crops of a real photograph, ``(8, 3, 64, 64)``, standardised."""
    import skimage.data

    image = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1).float() / 255
    crops = torch.stack([image[:, i : i + 64, j : j + 64] for i in (0, 150, 300, 448) for j in (100, 300)])
    return (crops - crops.mean()) / crops.std()


NETWORKS = [
    "timm:test_efficientnet",
    "timm:repvgg_a0",
    *broad("vgg16_bn", "densenet121", "googlenet", "mobilenet_v2", "efficientnet_b0"),
]


def build(name: str) -> nn.Module:
    if name.startswith("timm:"):
        return timm.create_model(name.removeprefix("timm:"), num_classes=5)
    options = {"init_weights": True} if name == "googlenet" else {}
    return torchvision.models.get_model(name, num_classes=5, **options)


def former_sites(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Second moment at every place where a norm was, those behind an alpha of zero aside."""
    plan = model._normfree_plan
    scaled = {alpha.path for alpha in plan.alphas}
    names = [edit.name for edit in plan.removed if edit.producer not in scaled and edit.name not in scaled]
    seen: dict[str, float] = {}

    def look(name: str) -> Any:
        return lambda _, args: seen.update({name: float(args[0].detach().square().mean())})

    handles = [model.get_submodule(name).register_forward_pre_hook(look(name)) for name in names]
    with torch.no_grad():
        model.train()(x)
    for handle in handles:
        handle.remove()
    assert set(seen) == set(names)
    return seen


@pytest.mark.parametrize("name", NETWORKS)
def test_second_moment_is_near_one_at_every_former_norm(name: str) -> None:
    x = photographs()
    calibrated = normfree.calibrate(normfree.convert(build(name), init="skipinit"), x)
    moments = former_sites(calibrated, x)
    assert moments
    assert re.fullmatch(r"unit variance behind (\d+) of \1 layers", calibrated._normfree_plan.calibrated)
    outside = {site: moment for site, moment in moments.items() if not 0.25 <= moment <= 4}
    assert outside == {}
    if name == "timm:repvgg_a0":
        identity_branch_is_standardised(calibrated, x)


def identity_branch_is_standardised(model: nn.Module, x: Tensor) -> None:
    """Of a parallel sum: it keeps a gain and a bias for that."""
    slot = model.get_submodule("stages.2.3.identity")
    assert sorted(dict(slot.named_parameters())) == ["bias", "gain"]
    seen: list[Tensor] = []
    slot.register_forward_hook(lambda _, args, y: seen.extend((args[0], y)))
    with torch.no_grad():
        model.train()(x)
    assert float(seen[0].mean()) > 0.3
    assert float(seen[1].mean((0, 2, 3)).abs().max()) < 1e-4
    assert float(seen[1].var((0, 2, 3), unbiased=False).mean()) == pytest.approx(1, rel=1e-3)


def plain(inputs: int) -> list[nn.Module]:
    """What VGG is made of."""
    return [nn.Conv2d(inputs, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]


def test_layers_have_unit_variance_and_zero_mean_in_one_sweep() -> None:
    model = normfree.convert(nn.Sequential(*plain(3), *plain(16), *plain(16), nn.MaxPool2d(2), *plain(16), *plain(16)))
    x = 5 + 3 * noise(8, 3, 32, 32)
    seen = outputs(normfree.calibrate(model, x), x)
    assert len(seen) == 5
    for y in seen.values():
        assert float(y.var(unbiased=False)) == pytest.approx(1, rel=1e-3)
        assert float(y.mean((0, 2, 3)).abs().max()) < 1e-3
    before = outputs(model, x)
    assert max(float(y.var()) for y in before.values()) > 5, "the copy was calibrated, not the model"


def test_alpha_zero_is_calibrated_as_if_it_were_one() -> None:
    model = normfree.convert(nn.Sequential(nn.Conv2d(3, 4, 1), Block(), Block()))
    x = noise(8, 3, 16, 16)
    calibrated = normfree.calibrate(model, x)
    assert calibrated[1].conv2.alpha == 0
    conv = copy.deepcopy(calibrated[1])
    set_alphas(conv, 1.0)
    seen: list[Tensor] = []
    conv.conv2.register_forward_hook(lambda _, __, y: seen.append(y))
    with torch.no_grad():
        conv(calibrated[0](x))
    assert float(seen[0].var()) == pytest.approx(1, rel=0.01)
    assert_close(calibrated(x), torch.relu(torch.relu(calibrated[0](x))), 1e-6)


def test_function_of_the_weights_only_is_rescaled() -> None:
    """Nothing but weights and biases of the rescaled layers changes."""
    model = normfree.convert(timm.create_model("resnet10t", num_classes=3))
    calibrated = normfree.calibrate(model, noise(4, 3, 32, 32))
    rescaled = {f"{path}.{leaf}" for path, _ in model._normfree_plan.weights for leaf in ("weight", "bias")}
    before, after = model.state_dict(), calibrated.state_dict()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed <= rescaled
    assert len(changed) > 20
    for path, _ in model._normfree_plan.weights:
        was, now = before[f"{path}.weight"], after[f"{path}.weight"]
        assert torch.allclose(now, was * (now.norm() / was.norm()), rtol=1e-4), "one factor a layer"


def test_several_batches_are_averaged() -> None:
    model = normfree.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    one, four = noise(8, 3, 8, 8), 4 * noise(8, 3, 8, 8)
    calibrated = normfree.calibrate(model, [one, four])
    with torch.no_grad():
        assert float(calibrated(one).var()) == pytest.approx(1 / 4, rel=0.05)
        assert float(calibrated(four).var()) == pytest.approx(4, rel=0.05)


def test_several_batches_are_averaged_in_a_slot_too() -> None:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.identity = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.bn(self.conv(x)) + self.identity(x))

    model, x = normfree.convert(Parallel()), 3 + 2 * noise(8, 4, 8, 8)
    once, twice, both = (normfree.calibrate(model, batches).identity for batches in (x, [x, x], [x, 4 * x]))
    with torch.no_grad():
        assert float(once(x).var((0, 2, 3), unbiased=False).mean()) == pytest.approx(1, rel=1e-3)
        assert_close(twice(x), once(x), 1e-5)
        assert float(both(x).var((0, 2, 3), unbiased=False).mean()) == pytest.approx(1 / 4, rel=1e-3)
        assert float((both(x) + both(4 * x)).mean((0, 2, 3)).abs().max()) < 1e-4, "both weigh the same"


@pytest.mark.parametrize(
    "batch", [noise(4, 3, 8, 8), [noise(4, 3, 8, 8), torch.zeros(4)], {"input": noise(4, 3, 8, 8)}], ids=type
)
def test_batches_come_as_loaders_give_them(batch: Any) -> None:
    model = normfree.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    calibrated = normfree.calibrate(model, [batch])
    assert float(calibrated(noise(4, 3, 8, 8)).detach().var(unbiased=False)) == pytest.approx(1, rel=1e-3)


def test_own_way_to_run_a_batch() -> None:
    model = normfree.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    x = noise(4, 3, 8, 8)
    calibrated = normfree.calibrate(model, ["any"], forward=lambda m, _: m(x))
    assert float(calibrated(noise(4, 3, 8, 8)).detach().var(unbiased=False)) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    "layer", [nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.Conv2d(4, 6, 1, groups=2, bias=False)]
)
def test_layers_of_other_kinds(layer: nn.Module) -> None:
    model = normfree.convert(nn.Sequential(layer, nn.BatchNorm2d(6)))
    x = noise(4, 4, 8, 8)
    y = normfree.calibrate(model, x)(x).detach()
    assert float(y.var(unbiased=False)) == pytest.approx(1, rel=1e-3)
    assert float(y.mean((0, 2, 3)).abs().max()) < 1e-4


def test_linear_layers_have_their_channels_last() -> None:
    model = normfree.convert(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU()))
    x = 2 + noise(64, 5)
    y = normfree.calibrate(model, x)[0](x).detach()
    assert float(y.var(unbiased=False)) == pytest.approx(1, rel=1e-3)
    assert float(y.mean(0).abs().max()) < 1e-4


def test_layer_without_a_bias_gets_unit_second_moment() -> None:
    model = normfree.convert(dense(2))
    x = noise(4, 3, 32, 32)
    calibrated = normfree.calibrate(model, x)
    biasless = [path for path, _ in model._normfree_plan.weights if calibrated.get_submodule(path).bias is None]
    for path, y in outputs(calibrated, x).items():
        if path in biasless:
            assert float(y.square().mean()) == pytest.approx(1, rel=1e-3)


def test_modes_buffers_and_hooks_are_as_before() -> None:
    net = nn.Sequential(Block(), nn.BatchNorm2d(4), nn.Dropout(), Block())
    model = normfree.convert(net, exclude="1").eval()
    model[1].train()
    model = normfree.calibrate(model, noise(4, 4, 8, 8))
    assert [m.training for m in (model, model[0], model[1], model[3])] == [False, False, True, False]
    assert int(model[1].num_batches_tracked) == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_cannot_be_calibrated_is_named() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.b, self.bn2 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor, second: bool = True) -> Tensor:
            return self.bn(self.a(x)) + (self.bn2(self.b(x)) if second else 0)

    model = normfree.convert(Unused())
    with pytest.warns(CalibrationWarning, match=r"not calibrated, constant or never reached: b$"):
        normfree.calibrate(model, noise(2, 3, 4, 4), forward=lambda m, x: m(x, second=False))


def test_errors_leave_the_model_as_it_was() -> None:
    from normfree.training.calibration import calibrate_

    model = normfree.convert(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    )
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match="0: its output is not finite on batch 2"):
        calibrate_(model, [noise(2, 3, 4, 4), noise(2, 3, 4, 4) * float("inf")])
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    with pytest.raises(UsageError, match="no layer was reached"):
        normfree.calibrate(model, [])
    with pytest.raises(UsageError, match="it carries no plan"):
        normfree.calibrate(Block(), noise(2, 4, 4, 4))


def test_reset_false_keeps_the_users_weights() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), Block())
    kept = normfree.convert(net, reset=False)
    assert torch.equal(kept[0].weight, net[0].weight)
    assert torch.equal(kept[1].conv1.weight, net[1].conv1.weight)
    assert normfree.verify(kept, net, noise(2, 3, 8, 8)).ok
    assert not torch.equal(normfree.convert(net)[1].conv1.weight, net[1].conv1.weight)
    assert kept._normfree_plan.weights, "calibration still knows which layers"
