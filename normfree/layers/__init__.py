"""What stands where a norm was: a layer and constants come in, a layer that computes with them goes out, or a slot."""

from __future__ import annotations

from torch import nn

from normfree.layers.carriers import (
    ScaledOutput,
    ScaledSum,
    ScaledWeight,
    scaled_output_class,
    scaled_weight_class,
    skipinit_name,
)
from normfree.layers.combining import Constants, mean_of, shift
from normfree.layers.copies import CopiedAffine, CopiedOutput, CopiedSkipInit
from normfree.layers.held import CONSTANTS, HasAlpha, alpha_of
from normfree.layers.linearity import is_carrier
from normfree.layers.slots import ChannelAffine, Channels, Copy, SkipInit, alpha_scale
from normfree.layers.vacant import Vacant

__all__ = [
    "CONSTANTS",
    "ChannelAffine",
    "Channels",
    "Constants",
    "CopiedAffine",
    "CopiedOutput",
    "CopiedSkipInit",
    "Copy",
    "HasAlpha",
    "ScaledOutput",
    "ScaledSum",
    "ScaledWeight",
    "SkipInit",
    "Vacant",
    "alpha_of",
    "alpha_scale",
    "is_carrier",
    "is_normfree",
    "mean_of",
    "scaled_output_class",
    "scaled_weight_class",
    "shift",
    "skipinit_name",
]


def is_normfree(module: nn.Module) -> bool:
    """Whether ``module`` is one of this package's own layers: how a second conversion is recognised."""
    return isinstance(module, (SkipInit, ChannelAffine, ScaledWeight, ScaledOutput, ScaledSum))
