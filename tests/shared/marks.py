"""What the parameters of a test are marked with."""

from __future__ import annotations

from typing import Any

import pytest


def broad(*values: Any) -> list[Any]:
    """Return parameters that only a run of everything takes."""
    return [pytest.param(value, marks=pytest.mark.broad) for value in values]
