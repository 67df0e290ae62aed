"""Every test starts from the same state of the global generator, on one thread; random networks are always the same.

No test knows how wide a terminal is, unless it says so: readline tells processes that have none of 80 columns.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

_common = settings(deadline=None, print_blob=True)
settings.register_profile("same", _common, derandomize=True)
settings.register_profile("search", _common)
settings.load_profile("same")  # --hypothesis-profile comes later, and wins


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    os.environ.pop("COLUMNS", None)
    torch.set_num_threads(1)
    torch.manual_seed(0)
