"""What the command line shows: tables and JSON on stdout, progress and errors on stderr."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import os
import re
import shutil
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import typer

from normfree.errors import AlreadyConvertedError, NoNormError, NormfreeError, UsageError, one_line

if TYPE_CHECKING:
    from rich.console import Console

    from normfree.plans import Plan
    from normfree.proofs import Proof

__all__ = ["Table", "note", "plan_tables", "print_json", "print_out", "print_table", "progress", "proof_table", "quiet"]
__all__ += ["reporting"]


@contextlib.contextmanager
def reporting(as_json: bool) -> Iterator[None]:
    """Exit 2 for wrong usage, 1 for what cannot be converted or read, with the message and no traceback.

    That is also what becomes of an error in a model's own code; NORMFREE_TRACEBACK=1 shows where it was.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: note(f"warning: {_in_options(str(message))}")
            yield
    except Exception as error:
        if isinstance(error, (typer.Exit, typer.Abort)) or os.environ.get("NORMFREE_TRACEBACK"):
            raise
        ours = isinstance(error, NormfreeError)
        message = _in_options(str(error)) if ours else f"{one_line(error)} ({_place(error)})"
        if as_json:
            print_json({"ok": False, "error": type(error).__name__, "message": message})
        else:
            note(f"error: {message}", style="red")
        wrong_usage = isinstance(error, UsageError) and not isinstance(error, (NoNormError, AlreadyConvertedError))
        raise typer.Exit(2 if wrong_usage else 1) from error


def _place(error: Exception) -> str:
    """Say where an error arose that is none of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}; NORMFREE_TRACEBACK=1 shows the way there" if frames else ""


_OPTIONS = "alpha|arms|device|dtype|exclude|include|init|num_classes|scope|size"


def _in_options(text: str) -> str:
    """Name the options of the command line, where a message names the arguments of a function, or both."""
    text = re.sub(r"\b\w+= \((--[a-z-]+(?: \d+)?)\)", r"\1", text).replace("--force (overwrite=True)", "--force")
    text = re.sub(rf"\b({_OPTIONS})='(\w+)'", r"--\1 \2", text).replace(" (--init)", "")
    text = re.sub(rf"^({_OPTIONS}) is ", r"--\1 is ", text)
    return text.replace("include, exclude and scope leave", "--include, --exclude and --scope leave")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let the failure of a library that downloads be told once, by the error; its progress stays on stderr."""
    hub = logging.getLogger("huggingface_hub")
    before = hub.level
    hub.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        hub.setLevel(before)


@contextlib.contextmanager
def progress(steps: int) -> Iterator[Callable[..., None]]:
    """Show a bar on stderr, and yield what moves it one step on: told what comes next, and how many there are now."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("importing torch", total=steps)
        yield lambda text, total=None: bar.update(task, description=text, advance=1, total=total)


class Table:
    """Rows under titles: as columns where that breaks no name, else one below the other."""

    def __init__(self, *titles: str) -> None:
        self.titles = titles
        self.rows: list[tuple[tuple[str, ...], str]] = []

    def add(self, *cells: str, style: str = "") -> None:
        """Add a row, in a style of rich's. Names may come from a file that anybody wrote."""
        self.rows.append((tuple(map(_plain, cells)), style))

    def lines(self, width: int) -> Iterator[tuple[str, str]]:
        """Yield what is printed, with its style."""
        rows = [(self.titles, ""), *self.rows]
        columns = list(zip(*(cells for cells, _ in rows), strict=True))
        widths = [max(len(line) for cell in column for line in cell.split("\n")) for column in columns]
        least = [max((len(word) for cell in column for word in cell.split()), default=0) for column in columns]
        room = width - 2 * (len(columns) - 1)
        while sum(widths) > room and widths != least:
            spare = [(have - need and have, i) for i, (have, need) in enumerate(zip(widths, least, strict=True))]
            widths[max(spare)[1]] -= 1
        for cells, style in rows if sum(widths) <= room else ():
            folded = [_folded(cell, wide) for cell, wide in zip(cells, widths, strict=True)]
            for parts in itertools.zip_longest(*folded, fillvalue=""):
                yield "  ".join(map(str.ljust, parts, widths)).rstrip(), style
        indent = max(map(len, self.titles[1:]), default=0) + 4
        for cells, style in self.rows if sum(widths) > room else ():
            yield cells[0], style
            for title, cell in zip(self.titles[1:], cells[1:], strict=True):
                for i, part in enumerate(_folded(cell, max(width - indent, 1))):
                    yield f"  {'' if i else title}".ljust(indent) + part, style


def _folded(cell: str, width: int) -> list[str]:
    """Break text at its blanks, never within a word: names can be copied."""
    lines = (textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) for line in cell.split("\n"))
    return list(itertools.chain.from_iterable(lines))


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, soft_wrap=True, highlight=False, markup=False)


def print_table(table: Table) -> None:
    """Print a table to stdout."""
    # Piped into a file or a pager there is no terminal whose width a table should be squeezed into.
    told = os.environ.get("COLUMNS", "")
    width = int(told) if told.isdigit() else shutil.get_terminal_size().columns if sys.stdout.isatty() else 200
    console = _console()
    for line, style in table.lines(width):
        console.print(line, style=style or None)


def plan_tables(plan: Plan) -> None:
    """Show every norm and every sum of a plan."""
    norms = Table("norm", "type", "fed by", "becomes", "why")
    for edit in plan.norms:
        norms.add(edit.name, edit.type, edit.feed, edit.action, edit.reason)
    print_table(norms)
    sums = Table("sum", "kind", "alpha", "why")
    for total in plan.sums:
        tails = [f"{a.path} ({a.place}{'' if a.channels is None else f' {a.channels}'})" for a in total.alphas]
        why = "\n".join((total.reason, *total.declined))
        sums.add(total.name, total.kind, "\n".join(tails) or "none", why)
    if plan.sums:
        print_table(sums)


def proof_table(proofs: tuple[Proof, ...]) -> None:
    """Show the proofs with their figures."""
    if not proofs:
        return
    from normfree.proofs.verify import verdict

    proven = Table("", "proof", "verdict", "figures")
    for proof in proofs:
        style = {True: "green", False: "red"}.get(proof.passed, "")  # type: ignore[arg-type]  # None is in neither
        proven.add(str(proof.number), proof.name, verdict(proof), proof.detail, style=style)
    print_table(proven)


def _plain(text: str) -> str:
    """Escape what a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def print_out(text: str) -> None:
    """Print text to stdout."""
    _console().print(_plain(_in_options(text)))


def note(text: str, style: str = "yellow") -> None:
    """Print a message to stderr, if there is one."""
    if text:
        _console(stderr=True).print(_plain(text), style=style)


def print_json(body: dict[str, Any]) -> None:
    """Print one line of JSON to stdout."""
    sys.stdout.write(json.dumps(body) + "\n")
