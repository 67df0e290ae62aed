"""Every test starts from the same state of the global generator, on one thread."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

_common = settings(deadline=None, print_blob=True, derandomize=bool(os.environ.get("CI")))
settings.register_profile("normfree", _common, max_examples=int(os.environ.get("NORMFREE_EXAMPLES", "100")))
settings.register_profile("thousand", _common, max_examples=1000)
settings.load_profile("normfree")  # --hypothesis-profile comes later, and wins


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
