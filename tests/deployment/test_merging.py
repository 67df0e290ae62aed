"""Blocks of parallel branches become one convolution when a model is fused, as their own library does it."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from harness import assert_close, both, noise, randomise
from marks import broad
from readings import plan_of
from structures import levit, rep
from timm.models.byobnet import MobileOneBlock
from timm.models.fastvit import RepMixer
from timm.utils.model import reparameterize_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.feature_extraction import create_feature_extractor

import normfree
from normfree.deployment.fuse import FuseWarning

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "repvgg": rep,
    "mobileone": lambda: nn.Sequential(MobileOneBlock(3, 8, 3, 2), MobileOneBlock(8, 8, 3, num_conv_branches=2)),
    "levit": levit,
}
NETWORKS = [
    *BLOCKS,
    *broad(
        "fastvit_t8", "repghostnet_050", "repvit_m0_9", "efficientvit_m0", "mobileone_s0", "repvgg_a0", "levit_128s"
    ),
]
pytestmark = pytest.mark.filterwarnings("ignore::normfree.checkpoint.saving.SaveWarning")


@torch.no_grad()
@both
@pytest.mark.parametrize("name", NETWORKS)
def test_branches_are_merged_exactly_and_timm_finds_nothing_left(name: str, init: str, tmp_path: Path) -> None:
    build = BLOCKS.get(name) or partial(timm.create_model, name, num_classes=3)
    model = normfree.convert(randomise(build()).double(), init=init, alpha=0.5).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FuseWarning)  # of residual branches around the blocks
        fused = normfree.fuse(model)
    x = noise(2, 3, *((64, 64) if name in ("levit", "repvgg") else (224, 224)), dtype=torch.float64)
    expected = model(x)
    assert_close(fused(x), expected)
    assert plan_of(fused).merged
    assert_close(reparameterize_model(fused)(x), expected)
    normfree.save(fused, tmp_path / "fused.safetensors")
    loaded = normfree.load(tmp_path / "fused.safetensors", model=build()).eval()
    assert torch.equal(loaded(x), fused(x))


@both
@pytest.mark.parametrize("name", NETWORKS)
def test_timm_is_told_to_fuse_before_it_merges(name: str, init: str) -> None:
    build = BLOCKS.get(name) or partial(timm.create_model, name, num_classes=3)
    model = normfree.convert(randomise(build()), init=init)
    with pytest.raises(AttributeError, match=r"wants normfree\.fuse\(model\) first, which merges them$"):
        reparameterize_model(model)


def test_what_was_a_norm_is_an_identity_to_everybody_else() -> None:
    model = normfree.convert(randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))), init="skipinit")
    slot = model[1]
    assert isinstance(slot, nn.Identity)
    assert (hasattr(slot, "running_mean"), getattr(slot, "weight", None)) == (False, None)
    with pytest.raises(AttributeError, match="wants normfree.fuse"):
        fuse_conv_bn_eval(model.eval()[0], slot)  # type: ignore[type-var]  # torch's own, of what no longer is a norm
    with pytest.raises(AttributeError, match="object has no attribute 'widht'"):
        _ = slot.widht
    assert type(normfree.fuse(model)[1]) is nn.Identity
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  # our own
        assert type(again[1]) is type(slot)
        assert again[1].training == slot.training
    extractor = create_feature_extractor(model, return_nodes=["1"])
    assert extractor(noise(2, 3, 5, 5))["1"].shape == (2, 4, 5, 5)
    torch.compiler.reset()  # other tests have compiled other sequences
    assert torch.compile(model, backend="eager", fullgraph=True)(noise(2, 3, 5, 5)).shape == (2, 4, 5, 5)


@both
def test_a_block_of_repvgg_is_one_convolution(init: str) -> None:
    original = randomise(rep())
    fused = normfree.fuse(normfree.convert(original, init=init)).eval()
    assert plan_of(fused).merged == ("stem", "stages.0.0", "stages.1.0", "stages.1.1")[: len(plan_of(fused).merged)]
    for path in plan_of(fused).merged:
        layers = [module for module in fused.get_submodule(path).modules() if isinstance(module, nn.Conv2d)]
        assert len(layers) == 1
    report = normfree.verify(fused, original, noise(2, 3, 32, 32))
    assert report.ok, str(report)


def test_a_block_that_cannot_be_merged_twice_is_left_as_it_is() -> None:
    model = normfree.convert(randomise(nn.Sequential(RepMixer(8), nn.Conv2d(8, 3, 1))), init="preserve").eval()
    fused, x = normfree.fuse(model), noise(2, 8, 14, 14)
    assert plan_of(fused).merged == ("0",)
    with pytest.raises(AttributeError, match="mixer"):
        reparameterize_model(reparameterize_model(nn.Sequential(RepMixer(8))))  # timm's own
    expected = fused(x)
    assert torch.equal(reparameterize_model(pickle.loads(pickle.dumps(fused)))(x), expected)  # noqa: S301  # our own
    assert_close(expected, model(x), tolerance=1e-5)


class Liar(nn.Module):
    """Its method makes something else of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x))

    def fuse(self) -> nn.Module:
        return nn.Conv2d(3, 3, 1)


def test_what_computes_something_else_is_not_taken() -> None:
    model = normfree.convert(randomise(nn.Sequential(Liar())).double(), init="preserve").eval()
    fused = normfree.fuse(model)
    assert isinstance(fused[0], Liar)
    assert plan_of(fused).merged == ()
    x = noise(2, 3, 5, 5, dtype=torch.float64)
    assert_close(fused(x), model(x))
