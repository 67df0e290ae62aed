"""Measure: a model comes in; out goes what a training step costs with its norms, without, and with substitutes."""

from __future__ import annotations

from normfree.bench.arms import ARMS, arm_names
from normfree.bench.results import Result, Spread
from normfree.bench.running import Setting, run

__all__ = ["ARMS", "Result", "Setting", "Spread", "arm_names", "run"]
