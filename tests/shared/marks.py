"""What the parameters of a test are marked with."""

from __future__ import annotations

from typing import Any

import pytest


def broad(*values: Any) -> list[Any]:
    """Return parameters that only a run of everything takes; a tuple holds one for each of several names."""
    several = (value if isinstance(value, tuple) else (value,) for value in values)
    return [pytest.param(*each, marks=pytest.mark.broad) for each in several]
