"""What normalisation costs, measured: one run, every arm in turn, and what does not depend on the machine at all."""

from __future__ import annotations

from normfree.bench.arms import ARMS, arm_names
from normfree.bench.results import Result, Spread
from normfree.bench.running import Setting, run

__all__ = ["ARMS", "Result", "Setting", "Spread", "arm_names", "run"]
