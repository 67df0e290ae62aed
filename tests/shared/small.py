"""Small networks of the kinds that the libraries have only in large."""

from __future__ import annotations

from timm.layers import BatchNormAct2d, create_conv2d
from timm.models.resnetv2 import ResNetV2
from torch import nn
from torchvision.models import DenseNet


def preactivated(*layers: int, classes: int = 5) -> nn.Module:
    """Return timm's pre-activation bottlenecks, as many a stage as `layers` says: norms that no layer feeds."""
    channels = [32 * 2**stage for stage in range(len(layers))]
    return ResNetV2(
        list(layers),
        channels,
        num_classes=classes,
        stem_chs=16,
        norm_layer=BatchNormAct2d,
        conv_layer=create_conv2d,
    )


def dense(classes: int = 5) -> nn.Module:
    """Return torchvision's DenseNet: every norm reads a concatenation."""
    return DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=classes)
