"""One small network of every kind of structure that people use, with its sums counted by hand.

Each is built of its library's own blocks; the large ones are in `networks.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import timm
import torch
from small import dense, preactivated
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.models.convmixer import ConvMixer
from timm.models.dla import DLA, DlaBasic
from timm.models.dpn import DPN
from timm.models.ghostnet import GhostBottleneck
from timm.models.hrnet import HighResolutionNet
from timm.models.levit import LevitDistilled
from timm.models.regnet import RegNet, RegNetCfg
from timm.models.xception_aligned import XceptionAligned
from torch import Tensor, nn
from torchvision.models import MobileNetV2, ResNet, ShuffleNetV2, resnet
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.googlenet import Inception
from torchvision.models.segmentation.fcn import FCN, FCNHead
from torchvision.models.vgg import make_layers
from torchvision.models.video import resnet as video

LARGE = (3, 64, 64)
FOUR = {"layers": (1, 1, 1, 1), "channels": (16, 16, 16, 16), "num_classes": 3}
INVERTED = [[1, 8, 1, 1], [6, 8, 2, 1], [6, 8, 3, 2]]


@dataclass(frozen=True)
class Structure:
    """How it is built, its sums (residual, parallel, merge), the scalars if they are fewer, and what it eats."""

    build: Callable[[], nn.Module]
    sums: tuple[int, int, int]
    scaled: int | None = None
    shape: tuple[int, ...] = (3, 32, 32)

    def inputs(self) -> Tensor:
        return torch.randn(2, *self.shape, generator=torch.Generator().manual_seed(3))


def make(name: str, **options: object) -> Callable[[], nn.Module]:
    return partial(timm.create_model, name, **options)


def rep() -> nn.Module:
    """Return RepVGG blocks: three convolutions of one input are added up, or two and an identity with its norm."""
    blocks = [ByoBlockCfg(type="rep", d=d, c=8, s=2, gs=0, br=1.0) for d in (1, 2)]
    return ByobNet(ByoModelCfg(blocks=tuple(blocks), stem_type="rep", stem_chs=8), num_classes=3)


def ghosts() -> nn.Module:
    """Return two blocks half of whose channels are made of the other half; the second strides and projects."""
    blocks = GhostBottleneck(8, 16, 8), GhostBottleneck(8, 16, 12, stride=2, se_ratio=0.25)
    return nn.Sequential(nn.Conv2d(3, 8, 1), *blocks)


def levit() -> nn.Module:
    """Return a transformer whose linear layers have batch norms; in evaluation its two heads are averaged."""
    return LevitDistilled(64, embed_dim=(16, 24), key_dim=8, depth=(1, 1), num_heads=(1, 2), num_classes=3)


def fcn() -> nn.Module:
    """Return a segmentation network with an auxiliary head: a dict comes out."""
    backbone = ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    backbone.layer4 = nn.Identity()
    layers = IntermediateLayerGetter(backbone, {"layer3": "out", "layer2": "aux"})
    return FCN(layers, FCNHead(256, 3), FCNHead(128, 3))


def space() -> nn.Module:
    """Return residual blocks of videos."""
    block = video.BasicBlock(4, 4, video.Conv3DSimple), video.BasicBlock(4, 4, video.Conv2Plus1D)
    return nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU(inplace=True), *block)


def hrnet() -> nn.Module:
    """Return stages of one to four resolutions, one block each; every resolution is added to every other one."""
    stages = {
        f"stage{n}": {
            "num_modules": 1,
            "num_branches": n,
            "block_type": "BASIC" if n > 1 else "BOTTLENECK",
            "num_blocks": (1,) * n,
            "num_channels": (4, 8, 8, 8)[:n],
            "fuse_method": "SUM",
        }
        for n in (1, 2, 3, 4)
    }
    return HighResolutionNet({"stem_width": 8, **stages}, num_classes=3)


def xception() -> nn.Module:
    """Return separable pre-activation blocks; the first projects its skip path, the last has none."""
    first, second = {"in_chs": 64, "out_chs": 16, "stride": 2}, {"in_chs": 16, "out_chs": 16, "stride": 1}
    third = {"in_chs": 16, "out_chs": (16, 16, 32), "stride": 1, "no_skip": True}
    return XceptionAligned([first, second, third], preact=True, num_classes=3)


STRUCTURES: dict[str, Structure] = {
    "basic blocks and a bottleneck": Structure(make("test_resnet"), (4, 0, 0)),
    "blocks of four kinds": Structure(make("test_byobnet"), (4, 0, 0)),
    "edge residuals without a skip path": Structure(make("test_efficientnet"), (0, 0, 0)),
    "inverted residuals": Structure(partial(MobileNetV2, 3, 0.25, INVERTED), (5, 0, 0)),
    "gates and hard activations": Structure(make("mobilenetv3_small_050"), (7, 0, 0)),
    "pre-activation": Structure(partial(preactivated, 1, 2), (3, 0, 0)),
    "separable pre-activation": Structure(xception, (2, 0, 0)),
    "squeeze-excite bottlenecks": Structure(make("seresnet50", **FOUR), (4, 0, 0)),
    "selective kernels": Structure(make("skresnet18", **FOUR), (4, 0, 8)),
    "split attention": Structure(make("resnest26d", **FOUR), (4, 0, 0)),
    "scales added one to the next": Structure(make("res2net50_26w_4s", **FOUR), (4, 0, 2)),
    "pooled skip paths": Structure(make("resnet50d", **FOUR), (4, 0, 0)),
    "grouped, with gates": Structure(partial(RegNet, RegNetCfg(4, 8, 16, 1.5, 8, se_ratio=0.25)), (4, 0, 0)),
    "parallel convolutions": Structure(rep, (0, 4, 0)),
    "dense": Structure(dense, (0, 0, 0)),
    "dense and residual": Structure(partial(DPN, (1,) * 4, (4,) * 4, 16, 8, num_classes=3, small=True), (4, 0, 0)),
    "aggregated in a tree": Structure(partial(DLA, [1, 1, 1, 2, 1, 1], [4, 4, 8, 8, 8, 8], block=DlaBasic), (10, 0, 0)),
    "resolutions merged": Structure(hrnet, (14, 0, 23)),
    "ghosts": Structure(ghosts, (2, 0, 0)),
    "sums of slices": Structure(make("rexnet_100", depth_mult=0.5, width_mult=0.25), (5, 0, 0)),
    "mixed patches": Structure(partial(ConvMixer, 8, 3, 3, 4, num_classes=3), (3, 0, 0)),
    "plain": Structure(partial(make_layers, [4, "M", 8, "M"], batch_norm=True), (0, 0, 0)),
    "branches concatenated": Structure(partial(Inception, 3, 4, 4, 4, 4, 4, 4), (0, 0, 0)),
    "channels shuffled": Structure(partial(ShuffleNetV2, [2, 2, 2], [4, 8, 16, 32, 32], 3), (0, 0, 0)),
    "segmentation with two heads": Structure(fcn, (3, 0, 0)),
    "videos": Structure(space, (2, 0, 0), shape=(3, 4, 8, 8)),
    "convolutions, then attention": Structure(make("test_coatnet", img_size=64), (8, 0, 0), 2, LARGE),
    "attention in windows and grids": Structure(make("test_maxvit", img_size=64), (4, 0, 0), shape=LARGE),
    "norms of linear layers": Structure(levit, (5, 1, 0), shape=LARGE),
}
