"""Wrapped models, norms added later, norms to synchronise where none are: what is refused or told, and the way out."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from harness import both, noise, randomise
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

import normfree
from normfree.errors import WrappedModelError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it imports is deprecated in torch
    from opacus.grad_sample import GradSampleHooks, GradSampleModule


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


@pytest.mark.parametrize("wrapper", [AveragedModel, ModelEmaV2, ModelEmaV3])
@pytest.mark.parametrize("convert", [normfree.convert, normfree.convert_, normfree.plan])
def test_average_of_weights_is_refused_with_the_way_out(wrapper: type[nn.Module], convert: object) -> None:
    wrapped = wrapper(net())
    with pytest.raises(WrappedModelError, match=rf"{wrapper.__name__}: convert what is inside \(model\.module\)"):
        convert(wrapped)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in normfree.convert(wrapped.module).modules())


def frozen() -> nn.Sequential:
    """Opacus takes a norm only if nothing of it learns."""
    model = net()
    model[1].requires_grad_(False)
    return model


def test_model_in_the_hands_of_opacus_is_refused_with_the_way_out() -> None:
    with pytest.raises(WrappedModelError, match=r"GradSampleModule: convert what is inside \(model\._module\)"):
        normfree.convert(GradSampleModule(frozen()))
    with pytest.raises(WrappedModelError, match=r"^0 is wrapped in GradSampleModule: convert the model before"):
        normfree.convert(nn.Sequential(GradSampleModule(frozen())))
    hooked = frozen()
    GradSampleHooks(hooked)
    with pytest.raises(WrappedModelError, match="Opacus has hooked the model: convert it before make_private"):
        normfree.convert(hooked)


def test_part_in_the_hands_of_ddp_is_refused_with_the_way_out(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.parallel.DistributedDataParallel(net()))
        with pytest.raises(
            WrappedModelError, match="^0 is wrapped in DistributedDataParallel: convert the model before"
        ):
            normfree.convert(model)
    finally:
        torch.distributed.destroy_process_group()


@both
def test_there_is_nothing_to_synchronise_after_a_conversion(init: str) -> None:
    converted = normfree.convert(net(), init=init)
    before = list(converted.modules())
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(converted)
    assert synchronised is converted
    assert all(one is other for one, other in zip(synchronised.modules(), before, strict=True))


@both
def test_norm_added_after_the_conversion_is_named(init: str) -> None:
    original = randomise(net())
    converted = normfree.convert(original, init=init)
    assert normfree.verify(converted, original, noise(2, 3, 6, 6)).ok
    converted[2] = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4))
    report = normfree.verify(converted, original, noise(2, 3, 6, 6))
    assert not report.ok
    assert "2.1" in str(report)


@both
def test_part_compiled_in_a_model_is_compiled_anew_after_the_conversion(init: str) -> None:
    inner = randomise(net()).eval()
    model = nn.Sequential(torch.compile(inner, backend="eager"))
    x = noise(2, 3, 6, 6)
    before = model(x)
    normfree.convert_(model, init=init)
    with torch.no_grad():
        assert torch.equal(model(x), inner(x))
        error = float((model(x) - before).abs().max())
    assert error < 1e-5 if init == "preserve" else error > 1e-2
