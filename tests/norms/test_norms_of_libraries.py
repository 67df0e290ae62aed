"""timm's and torchvision's norms, weight standardisation, and the norms that are per sample."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm.layers as tl
import torch
import torch.nn.functional as F
from harness import assert_close, assert_preserved, both, noise, prove, randomise
from readings import actions, norms, plan_of
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import normfree
from normfree.errors import UnsupportedModelError
from normfree.layers import ChannelAffine, Vacant, scaled_weight_class

FUSED: dict[str, Callable[[], nn.Module]] = {
    "act": lambda: tl.BatchNormAct2d(4),
    "silu": lambda: tl.BatchNormAct2d(4, act_layer=nn.SiLU),
    "no_act": lambda: tl.BatchNormAct2d(4, apply_act=False),
    "dropout": lambda: tl.BatchNormAct2d(4, drop_layer=partial(nn.Dropout, 0.5)),
    "dropout_only": lambda: tl.BatchNormAct2d(4, apply_act=False, drop_layer=partial(nn.Dropout, 0.5)),
    "frozen": lambda: tl.FrozenBatchNormAct2d(4),
    "frozen_no_act": lambda: tl.FrozenBatchNormAct2d(4, apply_act=False),
    "sync": lambda: tl.convert_sync_batchnorm(tl.BatchNormAct2d(4)),
    "sync_no_act": lambda: tl.SyncBatchNormAct(4),
}


@both
@pytest.mark.parametrize("kind", FUSED)
def test_fused_norm_leaves_its_activation_and_dropout(kind: str, init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), FUSED[kind](), nn.Conv2d(4, 2, 1))).eval()
    old = model[1]
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert actions(converted) == {"1": "fold"}
    assert norms(converted) == []
    assert_preserved(model, noise(2, 3, 6, 6))
    rest = [type(m) for m in old.children() if type(m) is not nn.Identity]
    assert [type(m) for m in converted[1].children()] == rest


@both
def test_fused_norm_without_a_producer_keeps_the_skip_path(init: str) -> None:
    class PreAct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = tl.BatchNormAct2d(4, inplace=True)
            self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv(self.norm(x))

    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), PreAct()))
    x = noise(2, 3, 6, 6)
    converted = prove(model, x, init=init)
    assert isinstance(converted[1].norm, ChannelAffine)
    assert converted[1].conv.bias is not None or init == "preserve"
    assert_preserved(model, x)
    if init == "skipinit":
        assert_close(converted(x), converted[0](x), 0)


def test_dropout_of_a_fused_norm_is_still_random_in_training_only() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), tl.BatchNormAct2d(4, drop_layer=partial(nn.Dropout, 0.5)))
    converted = normfree.convert(randomise(model), init="preserve")
    x = noise(2, 3, 6, 6)
    converted.train()
    assert not torch.equal(converted(x), converted(x))
    converted.eval()
    assert torch.equal(converted(x), converted(x))


@both
def test_torchvision_frozen_norm_folds(init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), FrozenBatchNorm2d(4), nn.ReLU()))
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert actions(converted) == {"1": "fold"}
    assert not any(isinstance(module, FrozenBatchNorm2d) for module in converted.modules())
    assert_preserved(model, noise(2, 3, 6, 6))


class WrittenTwice(nn.Module):
    """An in-place activation on the output of another: autograd refuses it where anything before it learns."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv = tl.FrozenBatchNormAct2d(3), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.bn(x).relu_())


@both
def test_affine_of_buffers_stays_frozen(init: str) -> None:
    model = randomise(WrittenTwice())
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert [name for name, p in converted.named_parameters() if p.requires_grad] == ["conv.weight", "conv.bias"]
    converted(noise(2, 3, 6, 6)).sum().backward()
    folded = normfree.convert(nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4)), init="preserve")
    assert {name for name, p in folded.named_parameters() if p.requires_grad} == {"0.weight", "1.bias"}


def test_frozen_norm_makes_auto_preserve() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4))
    assert normfree.plan(model).init == "preserve"
    assert normfree.plan(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).init == "skipinit"
    assert normfree.plan(randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))).init == "preserve"


@both
def test_sync_norm_converts_on_cpu(init: str) -> None:
    model = randomise(nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))))
    assert type(model[1]) is nn.SyncBatchNorm
    model.eval()
    x = noise(2, 3, 6, 6)
    converted = prove(model, x, init=init)
    assert actions(converted) == {"1": "fold"}
    assert isinstance(converted[1], ChannelAffine if init == "preserve" else nn.Identity)
    assert_preserved(model, x)


@both
@pytest.mark.parametrize("conv", [tl.StdConv2d, tl.ScaledStdConv2d, tl.StdConv2dSame])
def test_weight_standardisation_stays(conv: type[nn.Module], init: str) -> None:
    layers = [conv(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]
    model = randomise(nn.Sequential(*layers))
    x = noise(2, 3, 6, 6)
    converted = prove(model, x, init=init)
    assert actions(converted)["1"] in (["affine"] if init == "preserve" else ["delete", "bias"])
    assert actions(converted)["4"] == "fold"
    assert type(converted[0]) is conv
    assert torch.equal(converted[0].weight, model[0].weight)
    assert_preserved(model, x)
    report = normfree.verify(converted, model, x)
    assert (report.proofs[0].passed, report.proofs[0].figure) == (True, 0)


class FunctionalNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        return F.batch_norm(x, self.mean, self.var, training=self.training)


@both
@pytest.mark.parametrize("name", ["batch_norm of F", "batch_norm of torch"])
def test_functional_norm_on_an_activation_is_refused_with_its_place(name: str, init: str) -> None:
    class ThroughTorch(FunctionalNorm):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.bn(self.conv(x)))
            return torch.batch_norm(x, None, None, self.mean, self.var, self.training, 0.1, 1e-5, False)

    block = FunctionalNorm() if name.endswith("F") else ThroughTorch()
    with pytest.raises(UnsupportedModelError, match=r"stem\.0: calls F\.batch_norm on an activation") as error:
        normfree.convert(_named(block), init=init)
    assert "nn.BatchNorm" in str(error.value)


def _named(block: nn.Module) -> nn.Module:
    root = nn.Sequential()
    root.add_module("stem", nn.Sequential(block))
    return root


@both
def test_per_sample_norms_stay_as_they_are(init: str) -> None:
    model = randomise(
        nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            nn.GroupNorm(2, 4),
            nn.LayerNorm([4, 4, 4]),
            nn.LocalResponseNorm(2),
        )
    )
    x = noise(2, 3, 6, 6)
    before = {k: v.clone() for k, v in model[2].state_dict().items()}
    converted = normfree.convert(model, init=init, inputs=x)
    assert actions(converted) == {"1": "fold"}
    assert [type(m) for m in converted] == [
        scaled_weight_class(nn.Conv2d) if init == "preserve" else nn.Conv2d,
        ChannelAffine if init == "preserve" else Vacant,
        nn.InstanceNorm2d,
        nn.GroupNorm,
        nn.LayerNorm,
        nn.LocalResponseNorm,
    ]
    assert all(torch.equal(v, before[k]) for k, v in converted[2].state_dict().items())
    assert_preserved(model, x)


@both
def test_instance_norm_does_not_count_as_a_batch_norm_left(init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.InstanceNorm2d(4)))
    prove(model, noise(2, 3, 6, 6), init=init)
    tracked = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    prove(randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), tracked)), noise(2, 3, 6, 6), init=init)
    assert plan_of(prove(model, noise(2, 3, 6, 6), init=init)).declined == ()


def _of(module: str, name: str, forward: Any = None) -> type[nn.Module]:
    """Make a frozen batch norm that a library might have: buffers, and a number in the forward."""

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for key, value in {"weight": 1.5, "bias": 0.5, "running_mean": 0.25, "running_var": 2.0}.items():
                self.register_buffer(key, torch.full((4,), value) + torch.arange(4) / 8)

        def forward(self, x: Tensor) -> Tensor:
            scale = self.weight * (self.running_var + 1e-5).rsqrt()
            return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]

    Frozen.__module__, Frozen.__qualname__, Frozen.__name__ = module, name, name
    return Frozen


FROZEN = {
    "transformers.models.detr.modeling_detr": "DetrFrozenBatchNorm2d",
    "transformers.models.conditional_detr.modeling_conditional_detr": "ConditionalDetrFrozenBatchNorm2d",
    "transformers.models.deformable_detr.modeling_deformable_detr": "DeformableDetrFrozenBatchNorm2d",
    "transformers.models.rt_detr.modeling_rt_detr_resnet": "RTDetrFrozenBatchNorm2d",
    "transformers.models.d_fine.modeling_d_fine": "DFineFrozenBatchNorm2d",
    "detectron2.layers.batch_norm": "FrozenBatchNorm2d",
    "mmcv.cnn.bricks": "FrozenBatchNorm2d",
    "mmdet.models.layers": "FrozenBatchNorm2d",
}


@both
@pytest.mark.parametrize("module", FROZEN)
def test_frozen_norm_of_another_library_is_known_by_its_name(module: str, init: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), _of(module, FROZEN[module])(), nn.ReLU())
    plan = normfree.plan(model, init=init)
    assert [(edit.type, edit.action) for edit in plan.norms] == [(FROZEN[module], "fold")]
    assert_preserved(model, noise(2, 3, 6, 6))


def test_frozen_norms_need_not_be_told_that_they_were_trained() -> None:
    norm = _of("detectron2.layers.batch_norm", "FrozenBatchNorm2d")()
    assert normfree.plan(nn.Sequential(nn.Conv2d(3, 4, 1), norm)).init == "preserve"


class OwnCheck(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError


class Split(nn.BatchNorm2d):
    """Statistics of halves of a batch, in train mode only."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        return torch.cat([super(Split, self).forward(half) for half in input.chunk(2)])


Split.__module__, Split.__qualname__ = "lightly.models.batchnorm", "SplitBatchNorm"


class Wrapping(nn.Module):
    """Holds a batch norm, as torch_geometric's does."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        if x.size(0) < 1:
            return torch.nn.functional.batch_norm(x, self.module.running_mean, self.module.running_var)
        return self.module(x)


@both
@pytest.mark.parametrize("kind", [OwnCheck, Split, Wrapping])
def test_norm_that_differs_from_torchs_in_nothing_that_matters(kind: Any, init: str) -> None:
    norm = kind() if kind is Wrapping else kind(4)
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.ReLU()))
    assert [edit.action for edit in normfree.plan(model, init=init).norms] == ["fold"]
    assert_preserved(model, noise(2, 3, 6, 6))


def test_unknown_norms_are_one_line_a_class() -> None:
    class Odd(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return 3 * super().forward(input)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Odd(4), nn.Conv2d(4, 4, 1), Odd(4), Odd(4))
    with pytest.raises(UnsupportedModelError) as error:
        normfree.plan(model)
    assert len(error.value.problems) == 1
    assert "normfree.register_norm" in error.value.problems[0]
    assert error.value.problems[0].endswith("so are 3, 4")
