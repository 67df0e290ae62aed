"""What a benchmark found, for people and machines: a table, JSON, CSV and a plot."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["COLUMNS", "Result", "Spread", "flat", "write_csv", "write_plot"]


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise a series; one of a single value has no spread."""
        if len(values) < 2:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}} - {self.high:{spec}})"


@dataclass(frozen=True)
class Result:
    """The figures of one arm.

    Attributes:
        arm: Its name.
        parameters: Size of its parameters in bytes.
        saved_per_image: Bytes saved for backward an image.
        saved_constant: Bytes saved for backward whatever the batch.
        operators: Operators that forward and backward dispatch, views aside.
        activation_operators: Those of them that touch an activation.
        kernels: Kernels that a training step launches, compiled if that was asked for; on a GPU only, like the next
            two.
        peak_bytes: The most memory that the device holds during a step.
        largest_batch: Largest power of two that fits; not looked for under ``torch.compile``.
        step_ms: A training step (forward, backward, SGD) in milliseconds; ``None`` like the next two if nothing ran
            against the clock.
        forward_ms: Its forward pass alone, in train mode.
        fused_ms: A forward pass of the model as it is deployed, without gradients.
        step_to: Ratio of the training step to that of another arm in the same round, by its name.
    """

    arm: str
    parameters: int
    saved_per_image: int
    saved_constant: int
    operators: int
    activation_operators: int
    kernels: int | None = None
    peak_bytes: int | None = None
    largest_batch: int | None = None
    step_ms: Spread | None = None
    forward_ms: Spread | None = None
    fused_ms: Spread | None = None
    step_to: Mapping[str, Spread] = field(default_factory=dict)


COLUMNS = ["model", "arm", "init", "batch", "size", "device", "dtype", "compiled", "channels_last", "runs", "threads"]
COLUMNS += ["step_ms", "step_low", "step_high", "forward_ms", "fused_ms", "images_per_s"]
COLUMNS += ["to_bn", "to_bare", "to_bare_low", "to_bare_high", "saved_mib_per_image", "saved_constant_mib"]
COLUMNS += ["parameters_mib", "operators", "activation_operators", "kernels", "peak_mib", "largest_batch", "versions"]

_MIB = 1 << 20


def flat(result: Result, about: dict[str, Any]) -> dict[str, Any]:
    """Return one row of the CSV; ``about`` says what was measured."""
    to_bn, to_bare = result.step_to.get("bn"), result.step_to.get("bare")
    step = result.step_ms
    return about | {
        "arm": result.arm,
        "step_ms": step and round(step.median, 2),
        "step_low": step and round(step.low, 2),
        "step_high": step and round(step.high, 2),
        "forward_ms": result.forward_ms and round(result.forward_ms.median, 2),
        "fused_ms": result.fused_ms and round(result.fused_ms.median, 2),
        "images_per_s": step and round(1e3 * about["batch"] / step.median, 2),
        "to_bn": to_bn and round(to_bn.median, 4),
        "to_bare": to_bare and round(to_bare.median, 4),
        "to_bare_low": to_bare and round(to_bare.low, 4),
        "to_bare_high": to_bare and round(to_bare.high, 4),
        "saved_mib_per_image": round(result.saved_per_image / _MIB, 3),
        "saved_constant_mib": round(result.saved_constant / _MIB, 3),
        "parameters_mib": round(result.parameters / _MIB, 3),
        "operators": result.operators,
        "activation_operators": result.activation_operators,
        "kernels": result.kernels,
        "peak_mib": result.peak_bytes and round(result.peak_bytes / _MIB, 1),
        "largest_batch": result.largest_batch,
    }


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the rows of a run."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_plot(results: Sequence[Result], title: str, path: Path) -> None:
    """Draw the time of a training step, where it was taken, and the memory it saves: a bar an arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.5 * len(results) + 1.6), layout="constrained")
    time, memory = figure.subplots(1, 2, sharey=True)
    names = [result.arm for result in results]
    steps = [result.step_ms or Spread(0.0, 0.0, 0.0) for result in results]
    medians = [step.median for step in steps]
    errors = [[step.median - step.low for step in steps], [step.high - step.median for step in steps]]
    time.barh(names, medians, xerr=errors, color="tab:blue")
    time.set_xlabel("training step, ms (median, quartiles)")
    time.invert_yaxis()
    memory.barh(names, [result.saved_per_image / _MIB for result in results], color="tab:orange")
    memory.set_xlabel("saved for backward, MiB an image")
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
