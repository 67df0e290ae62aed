"""Chains of names in bytecode, ``self.a.b``: what they begin with, where they end, and whether they end in a call."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from types import CodeType

from normfree.code.bytecode import Step, instructions
from normfree.code.using import taken

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
        value: The number of the instruction that leaves on the stack what it ends at: with ``getattr``, the call.
        puts: Whether something is put under the last name, or what is there is taken away.
    """

    start: int
    end: int
    base: str | None
    names: tuple[str, ...]
    calls: bool
    value: int
    puts: bool


@functools.lru_cache(maxsize=4096)
def chains(code: CodeType) -> tuple[Chain, ...]:
    """Return the chains of a function in order; where ``getattr`` is given no written text, it ends in ``ANY``.

    Of ``f"layer{i}"`` the beginning is written; of what goes through a written tuple, there are as many chains.
    """
    steps, found, i = instructions(code), list[Chain](), 0
    while i < len(steps):
        start, base = i, None
        if steps[i].opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and isinstance(steps[i].argval, str):
            base, i = steps[i].argval, i + 1
        names: list[str] = []
        calls = False
        while i < len(steps) and steps[i].opname in ("LOAD_ATTR", "LOAD_METHOD") and not calls:
            if steps[i].is_jump_target and i > start:
                break  # what is asked here may be something else
            names.append(steps[i].argval)
            calls = steps[i].opname == "LOAD_METHOD"
            i += 1
        by = steps[start - 1].argval if start and base is not None and not calls else None
        puts, value, texts = by in _BY_TEXT[1:], i - 1, list[str]()
        if by in _BY_TEXT:
            texts, value, i = _texts(code, i), _call_with(steps, i), i + 1
        elif (names or base is not None) and not calls and steps[i].opname in ("STORE_ATTR", "DELETE_ATTR"):
            names, i, puts = [*names, steps[i].argval], i + 1, True
        elif names[-1:] in (["add_module"], ["register_module"]):
            names, texts, puts = names[:-1], _texts(code, i), True
        elif names[-1:] == ["_modules"] and steps[taken(steps, i)].opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            names, texts, puts = names[:-1], [str(steps[i].argval) if steps[i].opname == "LOAD_CONST" else ANY], True
        ends = [(*names, text) for text in texts] or ([tuple(names)] if names else [])
        found += [Chain(start, i - 1, base, end, calls, value, puts) for end in ends]
        i = i if ends else start + 1
    return tuple(found)


def _call_with(steps: Sequence[Step], i: int) -> int:
    """Return the call that what an instruction puts onto the stack becomes an argument of."""
    while not steps[i].opname.startswith("CALL") and i < len(steps) - 1:
        i = taken(steps, i)
    return i


def _texts(code: CodeType, i: int) -> list[str]:
    """Return what the text may be that begins at an instruction, with ``ANY`` for what is not written."""
    steps = instructions(code)
    step, end = steps[i], taken(steps, i)
    if step.opname == "LOAD_CONST" and steps[end].opname.startswith("CALL"):
        return [str(step.argval)]
    if step.opname == "LOAD_CONST" and steps[end].opname == "BUILD_STRING":
        return [str(step.argval) + ANY] if steps[taken(steps, end)].opname.startswith("CALL") else [ANY]
    if step.opname != "LOAD_FAST" or not steps[end].opname.startswith("CALL"):
        return [ANY]
    stores = _stores(code, step.argval)
    loops = [steps[k - 2].opname == "GET_ITER" and steps[k - 1].opname == "FOR_ITER" for k in stores]
    tuples = [_tuples(code, k - 3) if loop else [] for k, loop in zip(stores, loops, strict=True)]
    return [text for found in tuples for text in found] if tuples and all(tuples) else [ANY]


def _stores(code: CodeType, name: str) -> list[int]:
    """Return where a variable gets its values, none if that is not known."""
    steps = instructions(code)
    count = code.co_argcount + code.co_kwonlyargcount + bin(code.co_flags & 12).count("1")
    stores = [i for i, s in enumerate(steps) if s.argval == name and s.opname.startswith(("STORE_", "DELETE_"))]
    plain = all(steps[i].opname == "STORE_FAST" and not steps[i].is_jump_target for i in stores)
    return stores if plain and name not in (*code.co_varnames[:count], *code.co_cellvars) else []


def _tuples(code: CodeType, i: int) -> list[str]:
    """Return the texts of a written tuple that ends at an instruction, or of which a variable holds all or a part."""
    steps = instructions(code)
    if steps[i].opname == "LOAD_CONST" and not steps[i].is_jump_target:
        value = steps[i].argval
        return list(value) if isinstance(value, tuple) and all(isinstance(text, str) for text in value) else []
    if steps[i].opname != "LOAD_FAST":
        return []
    name, found = steps[i].argval, list[str]()
    for k in _stores(code, name):
        begins = next((j for j in range(k - 1, 0, -1) if steps[j].opname not in _SLICING), 0) + 1
        slices = {"BUILD_SLICE", "BINARY_SLICE"} & {step.opname for step in steps[begins:k]}
        if slices and steps[begins].argval == name:
            continue  # a part of itself
        texts = _tuples(code, k - 1) if steps[k - 1].opname == "LOAD_CONST" else []
        if not texts:
            return []
        found += texts
    return found


_SLICING = ("LOAD_CONST", "LOAD_FAST", "BUILD_SLICE", "BINARY_SUBSCR", "BINARY_SLICE", "BINARY_OP")
