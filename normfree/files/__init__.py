"""Files: checkpoints of others are read, our own are written; never half of one, and never a pickle that runs code."""

from __future__ import annotations

from normfree.files.fitting import check_fits, load_weights
from normfree.files.outputs import check_output, replacing
from normfree.files.reading import ENDINGS, read_state_dict
from normfree.files.writing import stored, write_state

__all__ = [
    "ENDINGS",
    "check_fits",
    "check_output",
    "load_weights",
    "read_state_dict",
    "replacing",
    "stored",
    "write_state",
]
