"""``config.json``: what timm and the Hugging Face Hub want to know of a folder with ``model.safetensors`` in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from normfree.errors import CheckpointError
from normfree.files import replacing

__all__ = ["read_config", "write_config"]

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


def read_config(folder: Path) -> tuple[str | None, int | None]:
    """Return the architecture that a folder names, as :func:`normfree.zoo.find` reads it, and its number of classes.

    Raises:
        CheckpointError: The configuration cannot be read.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None, None
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        name, classes = config.get("architecture"), config.get("num_classes")
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(name, str) or not (classes is None or type(classes) is int):
        raise CheckpointError(f"{path}: names no architecture, or no number of classes that is one")
    return (name if ":" in name else f"timm:{name}"), classes
