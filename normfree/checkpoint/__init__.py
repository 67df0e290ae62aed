"""Converted models in files: safetensors with the plan as JSON metadata, alone or in the folder that timm knows."""

from __future__ import annotations

from normfree.checkpoint.header import Header, read_header, weights_in
from normfree.checkpoint.loading import build_original, load
from normfree.checkpoint.saving import check_target, save, write
from normfree.checkpoint.streaming import convert_file

__all__ = [
    "Header",
    "build_original",
    "check_target",
    "convert_file",
    "load",
    "read_header",
    "save",
    "weights_in",
    "write",
]
