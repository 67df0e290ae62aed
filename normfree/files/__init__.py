"""Files: checkpoints of others are read, our own are written; never half of one, and never a pickle that runs code."""

from __future__ import annotations

from normfree.files.fitting import check_fits, load_weights, take
from normfree.files.outputs import check_output, replacing
from normfree.files.reading import ENDINGS, is_mapped, read_state_dict, reader
from normfree.files.writing import Pieces, stored, write_state

__all__ = [
    "ENDINGS",
    "Pieces",
    "check_fits",
    "check_output",
    "is_mapped",
    "load_weights",
    "read_state_dict",
    "reader",
    "replacing",
    "stored",
    "take",
    "write_state",
]
