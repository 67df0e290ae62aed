"""What the training experiments share: a table that survives being killed, and its page.

A run is one row of a CSV: what was asked for (the settings), and what came of it. A row that is there is not measured
again, so what is killed loses only the runs in flight, and `--workers` do several at once.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import multiprocessing
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

RESULTS = Path(__file__).parents[1] / "results"
STATUSES = ("trained", "diverged")
Row = dict[str, str]
Settings = Mapping[str, Any]


def rows(path: Path) -> list[Row]:
    """Read a table; a line that a killed process left unfinished lacks its last cell, the status: it does not count."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["status"] in STATUSES]


def find(path: Path, settings: Settings) -> Row | None:
    """Return the run with these settings, if the table has it."""
    return next(matching(rows(path), settings), None)


def matching(table: Iterable[Row], settings: Settings) -> Iterator[Row]:
    """Go through the runs of a table that have these settings."""
    wanted = {key: str(value) for key, value in settings.items()}
    return (row for row in table if wanted.items() <= row.items())


def measured(path: Path, settings: Settings, run: Callable[[], Any]) -> Row:
    """Return the row of these settings: the one that the table has, or a new one, which is added to it.

    Args:
        path: The CSV.
        settings: What tells this run from every other, by column.
        run: Does it, and returns a dataclass with the other columns.
    """
    known = find(path, settings)
    if known is not None:
        return known
    row = {key: "" if value is None else str(value) for key, value in {**settings, **asdict(run())}.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_bytes() if path.exists() else b""
    text = io.StringIO("\n" if old and not old.endswith(b"\n") else "")
    text.seek(0, io.SEEK_END)
    csv.writer(text, lineterminator="\n").writerows([row.values()] if old else [row.keys(), row.values()])
    with path.open("a", newline="") as file:  # one short write, so that two processes can share the file
        file.write(text.getvalue())
    return row


def nothing(_row: Row) -> list[Job]:
    """Want no other run, whatever came of this one."""
    return []


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        settings: What tells it from every other, by column.
        run: Does it, perhaps in another process, and returns a dataclass with the other columns.
        then: Is told what came of it, and returns the runs that are wanted next.
    """

    settings: Settings
    run: Callable[[], Any]
    then: Callable[[Row], list[Job]] = nothing


@dataclass(frozen=True)
class Study:
    """One cell of a table: what tells it from every other, and what trains with a rate and a seed."""

    settings: Settings
    run: Callable[[float, int], Any]

    def jobs(self, rates: Sequence[float], seeds: int) -> list[Job]:
        """Return the runs of seed 0; when all are done they want the other seeds of the rate that validates best."""
        tried: dict[float, Row] = {}

        def then(row: Row) -> list[Job]:
            tried[float(row["lr"])] = row
            best = max(tried, key=lambda lr: accuracy(tried[lr], "validation"))
            done = len(tried) == len(rates) and tried[best]["status"] == "trained"
            return [self.job(best, seed) for seed in range(1, seeds)] if done else []

        return [self.job(lr, 0, then) for lr in rates]

    def job(self, lr: float, seed: int, then: Callable[[Row], list[Job]] = nothing) -> Job:
        """Return the run with a rate and a seed."""
        return Job({**self.settings, "lr": lr, "seed": seed}, partial(self.run, lr, seed), then)


def study(path: Path, cells: Sequence[Study], rates: Sequence[float], seeds: int, workers: int = 1) -> None:
    """Try every learning rate with seed 0, and the one that validates best with the other seeds, for every cell.

    Args:
        path: The CSV.
        cells: In the order in which they are begun.
        rates: Learning rates.
        seeds: How many seeds the best gets.
        workers: How many runs at once.
    """
    measure(path, [job for cell in cells for job in cell.jobs(rates, seeds)], workers)


def measure(path: Path, jobs: Iterable[Job], workers: int = 1) -> None:
    """Do every job that the table does not have, with a progress bar.

    Args:
        path: The CSV.
        jobs: In the order in which they are begun; what one of them wants next comes before the rest.
        workers: How many at once, each in a process of its own: small networks leave most of a GPU idle.
    """
    waiting, running = deque(jobs), dict[Future[Row], Job]()
    pool = Here() if workers == 1 else ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    with pool, Progress(console=Console(stderr=True)) as progress:
        total = len(waiting)
        bar = progress.add_task("runs", total=total)
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.popleft()
                running[pool.submit(measured, path, job.settings, job.run)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                more = running.pop(future).then(future.result())
                waiting.extendleft(reversed(more))
                total += len(more)
                progress.update(bar, advance=1, total=total)


class Here(Executor):
    """Runs in this process, at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run and return what came of it; an error is raised here."""
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def accuracy(row: Row, part: str) -> float:
    """Return an accuracy in percent; what diverged has none, and is worth zero where it is compared."""
    return 100 * float(row[part]) if row["status"] == "trained" else 0.0


@dataclass(frozen=True)
class Summary:
    """The outcome of a study: the rate that validated best and the test accuracy of its seeds, in percent."""

    lr: float
    test: tuple[float, ...]

    def __str__(self) -> str:
        """Show mean, spread and rate as the paper's table does."""
        if not self.test:
            return "diverges"
        spread = f" ± {statistics.stdev(self.test):.1f}" if len(self.test) > 1 else ""
        return f"{statistics.mean(self.test):.1f}{spread} ({power(self.lr)})"


def summary(table: Sequence[Row], settings: Settings) -> Summary | None:
    """Summarise a study, or return nothing if no run of it is there."""
    mine = list(matching(table, settings))
    if not mine:
        return None
    first = [row for row in mine if row["seed"] == "0"]
    best = max(first, key=lambda row: accuracy(row, "validation"))["lr"]
    done = [row for row in mine if row["lr"] == best and row["status"] == "trained"]
    return Summary(float(best), tuple(accuracy(row, "test") for row in done))


def by_rate(table: Sequence[Row], settings: Settings) -> dict[float, float]:
    """Return the validation accuracy of seed 0 by learning rate, in order."""
    found = {float(row["lr"]): accuracy(row, "validation") for row in matching(table, {**settings, "seed": 0})}
    return dict(sorted(found.items()))


def usable(table: Sequence[Row], settings: Settings) -> str | None:
    """Write the range of learning rates that are about as good as the best, for seed 0."""
    found = by_rate(table, settings)
    good = within_a_point(found) if any(found.values()) else []
    return f"{power(good[0])} .. {power(good[-1])}" if good else None


def within_a_point(mean: dict[float, float], points: float = 1) -> list[float]:
    """The rates around the best whose accuracy is within a point of it, or within so many, without a gap."""
    rates = sorted(mean)
    best = max(rates, key=mean.__getitem__)
    good = [mean[best] - mean[lr] <= points for lr in rates]
    first = last = rates.index(best)
    while first > 0 and good[first - 1]:
        first -= 1
    while last < len(rates) - 1 and good[last + 1]:
        last += 1
    return rates[first : last + 1]


def power(lr: float) -> str:
    """Write a rate as a power of two."""
    return f"2^{math.log2(lr):g}"


def markdown(header: Sequence[object], body: Iterable[Sequence[object]]) -> str:
    """Write a table."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |" for line in lines)


def parser(description: str, table: str) -> argparse.ArgumentParser:
    """Return the options that every experiment has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--csv", type=Path, default=RESULTS / table, help="the table: what it holds is not run again")
    made.add_argument("--render", action="store_true", help="run nothing; write the page and the plot of the table")
    made.add_argument("--workers", type=int, default=1, help="how many runs at once, each in a process of its own")
    made.add_argument("--device", default="cpu")
    made.add_argument("--threads", type=int, default=1)
    return made
