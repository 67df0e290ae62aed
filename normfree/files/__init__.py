"""Files: a path comes in, tensors that fit a model go out; never half a file, and never a pickle that runs code."""

from __future__ import annotations

from normfree.files.entries import ANY, Choice
from normfree.files.fitting import check_fits, load_weights, prefix_of, take, without_prefix
from normfree.files.reading import ENDINGS, is_mapped, read_state_dict, read_weights, reader
from normfree.files.writing import Pieces, check_output, replacing, stored, write_state

__all__ = [
    "ANY",
    "ENDINGS",
    "Choice",
    "Pieces",
    "check_fits",
    "check_output",
    "is_mapped",
    "load_weights",
    "prefix_of",
    "read_state_dict",
    "read_weights",
    "reader",
    "replacing",
    "stored",
    "take",
    "without_prefix",
    "write_state",
]
