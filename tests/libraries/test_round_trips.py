"""Converted models in the hands of timm and torchvision: extractors, heads, averages, detectors, checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from harness import assert_close, both, noise, randomise, set_alphas
from marks import broad
from readings import norms, plan_of
from timm.models import load_checkpoint, resume_checkpoint
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

import normfree

X = noise(2, 3, 64, 64)


def same(found: list[Tensor] | tuple[Tensor, ...], expected: list[Tensor] | tuple[Tensor, ...]) -> None:
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 1e-5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mobilenetv3_small_050", "list"),
        ("test_resnet", "hook"),
        ("test_resnet", "fx"),
        *(pytest.param("resnet18", kind, marks=pytest.mark.broad) for kind in ("list", "hook", "fx")),
        *(pytest.param("mobilenetv3_small_050", kind, marks=pytest.mark.broad) for kind in ("hook", "fx")),
    ],
)
@torch.no_grad()
def test_feature_extractors(name: str, kind: str) -> None:
    options = {} if kind == "list" else {"feature_cls": kind}
    original = randomise(timm.create_model(name, features_only=True, **options)).eval()
    converted = normfree.convert(original, init="preserve")
    assert type(converted) is type(original)
    assert converted.feature_info.channels() == original.feature_info.channels()
    assert norms(converted) == []
    same(list(converted(X)), list(original(X)))
    assert normfree.verify(converted, original, X).ok
    # One whose stem is a feature of its own keeps a gain beside it; all the rest is what the whole network gets.
    whole = normfree.plan(timm.create_model(name), init="preserve")
    assert len(plan_of(converted).alphas) == len(whole.alphas)
    assert sum(edit.action == "fold" for edit in plan_of(converted).norms) >= len(plan_of(converted).norms) - 1


@torch.no_grad()
def test_features_that_are_collected_inside_the_blocks() -> None:
    options = {"feature_location": "expansion", "out_indices": (1, 2, 3, 4)}
    original = randomise(timm.create_model("mobilenetv3_small_050", features_only=True, **options)).eval()
    converted = normfree.convert(original, init="preserve")
    same(converted(X), original(X))
    assert normfree.verify(converted, original, X).ok
    assert len(plan_of(converted).alphas) == 7


@both
@torch.no_grad()
def test_a_feature_extractor_made_of_a_converted_model(init: str) -> None:
    converted = set_alphas(normfree.convert(randomise(timm.create_model("test_resnet")), init=init), 0.5).eval()
    final, intermediates = converted.forward_intermediates(X)
    features = timm.models.FeatureListNet(copy.deepcopy(converted), out_indices=(0, 1, 2, 3, 4))
    same(features(X), intermediates)
    assert_close(intermediates[-1], final, 1e-6)
    graph = timm.models.FeatureGraphNet(copy.deepcopy(converted), out_indices=(1, 2, 3, 4))
    same(graph(X), intermediates[1:])


@both
@torch.no_grad()
def test_intermediate_layers_of_a_transformer_with_a_convolutional_stem(init: str) -> None:
    original = timm.create_model("vit_base_mci_224", depth=2, num_classes=3, img_size=64, mlp_ratio=1.0)
    converted = normfree.convert(randomise(original), init=init).eval()
    original.eval()
    layers = converted.get_intermediate_layers(X, n=2, reshape=True)
    final, intermediates = converted.forward_intermediates(X)
    assert_close(layers[-1], intermediates[-1], 1e-6)
    assert [layer.shape for layer in layers] == [layer.shape for layer in original.get_intermediate_layers(X, 2, True)]
    if init == "preserve":
        same(layers, original.get_intermediate_layers(X, n=2, reshape=True))
        assert_close(final, original.forward_intermediates(X)[0], 1e-5)


@both
@pytest.mark.parametrize("name", ["test_resnet", *broad("resnet18", "mobilenetv3_small_050", "repvgg_a0")])
def test_conversion_before_and_after_another_head_is_the_same(name: str, init: str) -> None:
    original = randomise(timm.create_model(name, num_classes=7))
    before, after = copy.deepcopy(original), copy.deepcopy(original)
    torch.manual_seed(0)
    before = normfree.convert(before, init=init)
    torch.manual_seed(1)
    before.reset_classifier(3)
    torch.manual_seed(1)
    after.reset_classifier(3)
    torch.manual_seed(0)
    after = normfree.convert(after, init=init)
    assert plan_of(before) == plan_of(after)
    assert before.num_classes == after.num_classes == 3
    heads = ("fc", "classifier", "head.fc")
    constants = {f"{head}.{leaf}" for head in heads for leaf in ("gain", "center", "at_center")}
    assert after.state_dict().keys() - constants == before.state_dict().keys()
    x = noise(2, 3, 32, 32)
    with torch.no_grad():
        assert_close(before.eval()(x), after.eval()(x), 1e-6)
        assert before(x).shape == (2, 3)


def steps(model: nn.Module, average: Any, count: int = 3) -> list[dict[str, Tensor]]:
    """Train, update ``average`` after every step, and return the states."""
    optimizer = torch.optim.SGD(normfree.param_groups(model, lr=0.01))
    states = []
    for _ in range(count):
        optimizer.zero_grad()
        model(X[:1]).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average(model)
        states.append(copy.deepcopy(model.state_dict()))
    return states


@both
def test_moving_averages(init: str) -> None:
    model = normfree.convert(randomise(timm.create_model("test_resnet", num_classes=3)), init=init, alpha=0.5)
    expected = copy.deepcopy(model.state_dict())
    ema, swa = ModelEmaV3(model, decay=0.5), AveragedModel(model)
    torchs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)

    def update(trained: nn.Module) -> None:
        ema.update(trained)
        swa.update_parameters(trained)
        torchs.update_parameters(trained)

    states = steps(model, update)
    moving = states[0]
    for state in states:
        expected = {key: (value + state[key]) / 2 for key, value in expected.items()}
    for state in states[1:]:  # torch's starts with the first state that it sees
        moving = {key: (value + state[key]) / 2 for key, value in moving.items()}
    for key in expected:
        assert_close(ema.module.state_dict()[key], expected[key], 1e-5)
        assert_close(swa.module.state_dict()[key], sum(state[key] for state in states) / 3, 1e-5)
        assert_close(torchs.module.state_dict()[key], moving[key], 1e-5)
    assert type(ema.module) is type(swa.module) is type(model)
    update_bn([X], swa)  # a run over the data that batch norm would need: here there is nothing to update
    assert_close(swa.module.fc.weight, sum(state["fc.weight"] for state in states) / 3, 1e-5)


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, *broad(nn.BatchNorm2d)])
def test_backbones_of_detectors(norm: type[nn.Module]) -> None:
    original = randomise(
        resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=3, norm_layer=norm)
    )
    converted = normfree.convert(original, init="preserve")
    assert normfree.verify(converted, original, X).ok
    assert [total.kind for total in plan_of(converted).sums].count("residual") == 8
    assert list(converted.eval()(X)) == list(original.eval()(X)) == ["0", "1", "2", "3", "pool"]
    same(list(converted(X).values()), list(original(X).values()))
    frozen = {name for name, p in converted.named_parameters() if not p.requires_grad}
    assert {name.split(".")[1] for name in frozen if name.endswith(".weight")} == {"conv1", "layer1"}
    assert not any(p.requires_grad for name, p in converted.named_parameters() if name.endswith(".gain")) or (
        norm is nn.BatchNorm2d
    )
    detector = detection.FasterRCNN(converted, num_classes=3, min_size=64, max_size=64).train()
    target = {"boxes": torch.tensor([[4.0, 4.0, 30.0, 30.0]]), "labels": torch.tensor([1])}
    losses = detector([X[0]], [target])  # a batch of one
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in converted.named_parameters():
        assert (parameter.grad is not None) is parameter.requires_grad, name
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name


@both
def test_timm_saves_and_resumes(init: str, tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = normfree.convert(randomise(timm.create_model("test_resnet", num_classes=3)), init=init, alpha=0.5)
        return model, torch.optim.SGD(normfree.param_groups(model, lr=0.01), momentum=0.9)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(X).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    model, optimizer = build()
    step(model, optimizer)
    ema = ModelEmaV3(model)
    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=1.0)
    step(model, optimizer)
    ema.update(model)

    other, its_optimizer = build()
    assert resume_checkpoint(other, str(tmp_path / "last.pth.tar"), its_optimizer, log_info=False) == 1
    step(other, its_optimizer)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
    averaged, _ = build()
    load_checkpoint(averaged, str(tmp_path / "last.pth.tar"), use_ema=True)
    assert not torch.equal(averaged.fc.weight, model.fc.weight)
    with pytest.raises(RuntimeError, match="Missing key"):
        load_checkpoint(timm.create_model("test_resnet", num_classes=3), str(tmp_path / "last.pth.tar"))
