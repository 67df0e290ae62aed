"""What the command line shows: tables and JSON on stdout, progress and errors on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer

from normfree.errors import AlreadyConvertedError, NoNormError, NormfreeError, UsageError

if TYPE_CHECKING:
    from rich.progress import Progress

    from normfree.plans import Plan
    from normfree.proofs import Proof

__all__ = ["Steps", "note", "plan_tables", "print_json", "print_out", "printable", "progress", "proof_table"]
__all__ += ["reporting", "table"]


@contextlib.contextmanager
def reporting(as_json: bool) -> Iterator[None]:
    """Exit 2 for wrong usage, 1 for what cannot be converted or read, with the message and no traceback."""
    try:
        yield
    except NormfreeError as error:
        if as_json:
            print_json({"ok": False, "error": type(error).__name__, "message": str(error)})
        else:
            note(f"error: {error}", style="red")
        wrong_usage = isinstance(error, UsageError) and not isinstance(error, (NoNormError, AlreadyConvertedError))
        raise typer.Exit(2 if wrong_usage else 1) from error


class Steps:
    """Moves a progress bar: calling it says what comes next."""

    def __init__(self, bar: Progress, steps: int | None) -> None:
        self.bar = bar
        self.task = bar.add_task("starting", total=steps)

    def __call__(self, text: str) -> None:
        """Go one step on, to what ``text`` says."""
        self.bar.update(self.task, description=text, advance=1)

    def total(self, steps: int) -> None:
        """Say how many steps there are, once that is known."""
        self.bar.update(self.task, total=steps)


@contextlib.contextmanager
def progress(steps: int | None = None) -> Iterator[Steps]:
    """Show a bar on stderr while the work goes on."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield Steps(progress, steps)


def plan_tables(plan: Plan) -> None:
    """Show every norm and every sum of a plan."""
    from rich.markup import escape

    norms = table("norm", "type", "fed by", "becomes", "why")
    for edit in plan.norms:
        norms.add_row(*map(escape, (edit.name, edit.type, edit.feed, edit.action, edit.reason)))
    print_out(norms)
    sums = table("sum", "kind", "alpha", "why")
    for total in plan.sums:
        tails = [f"{a.path} ({a.place}{'' if a.channels is None else f' {a.channels}'})" for a in total.alphas]
        why = "\n".join((total.reason, *total.declined))
        sums.add_row(*map(escape, (total.name, total.kind, "\n".join(tails) or "none", why)))
    if plan.sums:
        print_out(sums)


def proof_table(proofs: tuple[Proof, ...]) -> None:
    """Show the proofs with their figures."""
    if not proofs:
        return
    from rich.markup import escape

    from normfree.proofs.verify import verdict

    styles = {True: "[green]{}[/]", False: "[red]{}[/]", None: "{}"}
    proven = table("", "proof", "", "figures")
    for proof in proofs:
        word = styles[proof.passed].format(verdict(proof))
        proven.add_row(str(proof.number), proof.name, word, escape(proof.detail))
    print_out(proven)


def table(*columns: str) -> Any:
    """Return an empty table with these columns, for :func:`print_out`."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def printable(text: str) -> str:
    """Escape what a terminal would obey: names may come from a file that anybody wrote. Also rich's own markup."""
    from rich.markup import escape

    return escape(_plain(text))


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def print_out(what: Any) -> None:
    """Print text or a table to stdout."""
    from rich.console import Console

    # Piped into a file or a pager there is no terminal whose width a table should be squeezed into.
    width = None if sys.stdout.isatty() else 200
    Console(width=width, soft_wrap=isinstance(what, str), highlight=False, markup=not isinstance(what, str)).print(what)


def note(text: str, style: str = "yellow") -> None:
    """Print a message to stderr."""
    from rich.console import Console

    Console(stderr=True, soft_wrap=True, highlight=False, markup=False).print(_plain(text), style=style)


def print_json(body: dict[str, Any]) -> None:
    """Print one line of JSON to stdout."""
    sys.stdout.write(json.dumps(body) + "\n")
