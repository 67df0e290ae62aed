"""``config.json``: what timm and the Hugging Face Hub want to know of a folder with ``model.safetensors`` in it."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from normfree.files import replacing

__all__ = ["write_config"]

CONFIG = "config.json"


def write_config(model: nn.Module, folder: Path, source: str | None, num_classes: int | None) -> None:
    """Write the configuration: timm's own of its own models, and name and number of classes of others."""
    with replacing(folder / CONFIG) as temporary:
        library, *_ = (source or "").partition(":")
        if isinstance(getattr(model, "pretrained_cfg", None), dict) and library in ("", "timm"):
            from timm.models._hub import save_config_for_hf

            save_config_for_hf(model, str(temporary))
        else:
            config = {"architecture": source or type(model).__name__, "num_classes": num_classes}
            temporary.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
