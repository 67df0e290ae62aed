"""What reading their code says about the sums of one member of each architecture family, held against the plan.

``families.csv`` is the list: every number was counted in the model's own code before the plan was asked, and
``derivation`` says how. It counts additions of two activations in what the plan looks at, once for every place that
runs: ``a + b + c`` is one residual or one parallel sum, but each addition of a merge counts. Adding a parameter or a
constant is no sum. Not looked at, and not counted, are modules that hold neither a batch norm nor a convolution nor a
pooling. Where a model adds up boxes or flows, only its part ``within`` which the norms are is counted; nothing else may
have a scalar.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Family:
    """One row of the list."""

    source: str
    file: str
    residual: int
    parallel: int
    merge: int
    within: str
    derivation: str

    @property
    def device(self) -> str:
        # Their builder computes the widths with tensors and reads them back, which meta tensors do not allow.
        return "cpu" if self.source.startswith("torchvision:regnet_") else "meta"


def read_families() -> tuple[Family, ...]:
    with Path(__file__).with_name("families.csv").open(newline="") as lines:
        return tuple(
            Family(
                row["source"],
                row["file"],
                int(row["residual"]),
                int(row["parallel"]),
                int(row["merge"]),
                row["within"],
                row["derivation"],
            )
            for row in csv.DictReader(lines)
        )


FAMILIES = read_families()
