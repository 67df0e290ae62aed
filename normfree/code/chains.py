"""Chains of names in bytecode, ``self.a.b``: what they begin with, where they end, and whether they end in a call."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import CodeType

from normfree.code.bytecode import instructions

__all__ = ["ANY", "Chain", "chains"]

ANY = "*"
"""Whatever something holds."""
_BY_TEXT = ("getattr", "setattr", "delattr")


@dataclass(frozen=True)
class Chain:
    """``base.a.b.c`` in some bytecode, from one instruction to another; it ends in a call or is taken as a value.

    Attributes:
        start: The number of its first instruction.
        end: The number of its last.
        base: The variable that it begins with, if it begins with one.
        names: The names behind that.
        calls: Whether the last is called at once.
        puts: Whether something is put under the last name, or what is there is taken away.
    """

    start: int
    end: int
    base: str | None
    names: tuple[str, ...]
    calls: bool
    puts: bool


@functools.lru_cache(maxsize=4096)
def chains(code: CodeType) -> tuple[Chain, ...]:
    """Return the chains of a function in order; where ``getattr`` is given no written text, it ends in ``ANY``."""
    steps, found, i = instructions(code), list[Chain](), 0
    while i < len(steps):
        start, base = i, None
        if steps[i].opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and isinstance(steps[i].argval, str):
            base, i = steps[i].argval, i + 1
        names: list[str] = []
        calls = False
        while i < len(steps) and steps[i].opname in ("LOAD_ATTR", "LOAD_METHOD") and not calls:
            names.append(steps[i].argval)
            calls = steps[i].opname == "LOAD_METHOD"
            i += 1
        by = steps[start - 1].argval if start and base is not None and not calls else None
        puts = by in _BY_TEXT[1:]
        if by in _BY_TEXT:
            text = steps[i].argval if steps[i].opname == "LOAD_CONST" else ANY
            names, i = [*names, str(text)], i + 1
        elif (names or base is not None) and not calls and steps[i].opname in ("STORE_ATTR", "DELETE_ATTR"):
            names, i, puts = [*names, steps[i].argval], i + 1, True
        if names:
            found.append(Chain(start, i - 1, base, tuple(names), calls, puts))
        else:
            i = start + 1
    return tuple(found)
