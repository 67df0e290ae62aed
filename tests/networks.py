"""The networks that must be right, with what reading their code says about their sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from normfree import zoo


@dataclass(frozen=True)
class Network:
    """One network: where it comes from, what it eats, and its sums counted by hand.

    `scaled` differs from `residual` where blocks without batch norm have residual sums too. What holds neither a norm
    nor a convolution (the attention layers of maxvit_t) is not looked into, and its sums are not counted.
    """

    source: str
    residual: int = 0
    parallel: int = 0
    merge: int = 0
    scaled: int | None = None
    shape: tuple[int, ...] = (3, 64, 64)

    def build(self) -> nn.Module:
        return zoo.build(zoo.find(self.source))

    def inputs(self) -> Tensor:
        return torch.randn(2, *self.shape, generator=torch.Generator().manual_seed(3))


LARGE = (3, 224, 224)
NETWORKS = (
    Network("torchvision:resnet18", 8),
    Network("torchvision:resnet50", 16),
    Network("torchvision:wide_resnet50_2", 16),
    Network("torchvision:resnext50_32x4d", 16),
    Network("torchvision:mobilenet_v2", 10),
    Network("torchvision:mobilenet_v3_large", 10),
    Network("torchvision:efficientnet_b0", 9),
    Network("torchvision:efficientnet_v2_s", 35),
    Network("torchvision:regnet_y_400mf", 16),
    Network("torchvision:mnasnet1_0", 10),
    Network("torchvision:densenet121"),
    Network("torchvision:vgg16_bn"),
    Network("torchvision:googlenet"),
    Network("torchvision:inception_v3", shape=(3, 299, 299)),  # its auxiliary head takes nothing smaller
    Network("torchvision:shufflenet_v2_x1_0"),
    Network("torchvision:r3d_18", 8, shape=(3, 4, 48, 48)),
    Network("torchvision:fcn_resnet50", 16),
    Network("torchvision:maxvit_t", 11, shape=LARGE),
    Network("timm:resnet18", 8),
    Network("timm:resnet50", 16),
    Network("timm:resnet50d", 16),
    Network("timm:resnetv2_50", 16),
    Network("timm:seresnet50", 16),
    Network("timm:ecaresnet26t", 8),
    Network("timm:resnest26d", 8),
    Network("timm:res2net50_26w_4s", 16, merge=24),
    Network("timm:skresnet18", 8),
    Network("timm:dpn68", 22),
    Network("timm:dla34", 12),
    Network("timm:efficientnet_b0", 9),
    Network("timm:tf_efficientnet_lite0", 9),
    Network("timm:mobilenetv3_small_100", 6),
    Network("timm:regnety_002", 13),
    Network("timm:ghostnet_100", 16),
    Network("timm:rexnet_100", 11),
    Network("timm:convmixer_768_32", 32),
    Network("timm:xception41p", 12),
    Network("timm:repvgg_a0", parallel=22),
    Network("timm:hrnet_w18_small", 23, merge=23),
    Network("timm:levit_128s", 20, parallel=1, shape=LARGE),
    Network("timm:coatnet_nano_rw_224", 25, scaled=7, shape=LARGE),
    Network("timm:vgg11_bn"),
    Network("timm:densenet121"),
)
