"""Keep: a converted model comes in, safetensors with its plan go out, alone or in a folder for timm; and back."""

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
