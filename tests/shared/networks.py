"""The networks that must be right; what reading their code says about their sums stands in `families.csv`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from families import FAMILIES
from torch import Tensor, nn

from normfree import zoo


@dataclass(frozen=True)
class Network:
    """One network: where it comes from and what it eats.

    `scaled` differs from the number of residual sums where blocks without batch norm have some too. What holds neither
    a norm nor a convolution (the attention layers of maxvit_t) is not looked into, and its sums are not counted.
    """

    source: str
    scaled: int | None = None
    shape: tuple[int, ...] = (3, 64, 64)

    @property
    def sums(self) -> tuple[int, int, int]:
        """The sums counted by hand: residual, parallel, merge."""
        row = next(family for family in FAMILIES if family.source == self.source)
        return row.residual, row.parallel, row.merge

    def build(self) -> nn.Module:
        return zoo.build(zoo.find(self.source))

    def inputs(self) -> Tensor:
        return torch.randn(2, *self.shape, generator=torch.Generator().manual_seed(3))


LARGE = (3, 224, 224)
NETWORKS = (
    Network("torchvision:resnet18"),
    Network("torchvision:resnet50"),
    Network("torchvision:wide_resnet50_2"),
    Network("torchvision:resnext50_32x4d"),
    Network("torchvision:mobilenet_v2"),
    Network("torchvision:mobilenet_v3_large"),
    Network("torchvision:efficientnet_b0"),
    Network("torchvision:efficientnet_v2_s"),
    Network("torchvision:regnet_y_400mf"),
    Network("torchvision:mnasnet1_0"),
    Network("torchvision:densenet121"),
    Network("torchvision:vgg16_bn"),
    Network("torchvision:googlenet"),
    Network("torchvision:inception_v3", shape=(3, 299, 299)),  # its auxiliary head takes nothing smaller
    Network("torchvision:shufflenet_v2_x1_0"),
    Network("torchvision:r3d_18", shape=(3, 4, 48, 48)),
    Network("torchvision:fcn_resnet50"),
    Network("torchvision:maxvit_t", shape=LARGE),
    Network("timm:resnet18"),
    Network("timm:resnet50"),
    Network("timm:resnet50d"),
    Network("timm:resnetv2_50"),
    Network("timm:seresnet50"),
    Network("timm:ecaresnet26t"),
    Network("timm:resnest26d"),
    Network("timm:res2net50_26w_4s"),
    Network("timm:skresnet18"),
    Network("timm:dpn68"),
    Network("timm:dla34"),
    Network("timm:efficientnet_b0"),
    Network("timm:tf_efficientnet_lite0"),
    Network("timm:mobilenetv3_small_100"),
    Network("timm:regnety_002"),
    Network("timm:ghostnet_100"),
    Network("timm:rexnet_100"),
    Network("timm:convmixer_768_32"),
    Network("timm:xception41p"),
    Network("timm:repvgg_a0"),
    Network("timm:hrnet_w18_small"),
    Network("timm:levit_128s", shape=LARGE),
    Network("timm:coatnet_nano_rw_224", scaled=7, shape=LARGE),
    Network("timm:vgg11_bn"),
    Network("timm:densenet121"),
)
