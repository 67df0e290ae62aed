"""Chains of names in bytecode, ``self.a.b``: what they begin with, where they end, and whether they end in a call."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any

from torch import nn

from normfree.code.bytecode import Step, attribute_of, called_by, instructions
from normfree.code.using import is_argument, taken

__all__ = ["ANY", "Chain", "chains", "is_of_file", "kind_behind"]

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
        elif steps[i].opname in ("LOAD_ATTR", "LOAD_METHOD") and _is_super(steps, i - 1):
            base = next(iter(code.co_varnames), None)
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
        if by in _BY_TEXT and is_argument(steps, i - 1):
            texts, value, i = _texts(code, i), _call_with(steps, i), i + 1
        elif (names or base is not None) and not calls and steps[i].opname in ("STORE_ATTR", "DELETE_ATTR"):
            names, i, puts = [*names, steps[i].argval], i + 1, True
        elif names[-1:] in (["add_module"], ["register_module"]):
            names, texts, puts = names[:-1], _texts(code, i), True
        elif names[-1:] == ["_modules"] and steps[taken(steps, i)].opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            names, texts, puts = names[:-1], [str(steps[i].argval) if steps[i].opname == "LOAD_CONST" else ANY], True
        elif i == start and steps[i].argval in _BY_TEXT and _gives_other(steps, i):
            texts, value, i, puts = [ANY], taken(steps, i), i + 1, steps[i].argval != "getattr"
        ends = [(*names, text) for text in texts] or ([tuple(names)] if names else [])
        above = _is_super(steps, start - 1) or (start > 1 and steps[start - 2].argval == "super")
        if not (above and names == [code.co_name]):  # ``super().forward(x)`` in a forward is no other call
            found += [Chain(start, i - 1, base, end, calls, value, puts) for end in ends]
        i = i if ends else start + 1
    return tuple(found)


def kind_behind(code: CodeType, chain: Chain, around: Mapping[str, Any]) -> type:
    """Return of which class a chain's variable is, as the instructions before it have asked: ``if isinstance(m, K):``.

    Args:
        code: The code.
        chain: The chain.
        around: The globals of the code.
    """
    steps = instructions(code)
    jump, call = chain.start - 1, chain.start - 2
    called = called_by(steps, call) if call > 0 and steps[jump].opname == "POP_JUMP_IF_FALSE" else []
    if len(called) < 3 or called[0].argval != "isinstance" or steps[chain.start].is_jump_target:
        return nn.Module
    kind = attribute_of(called[2:], around) if called[1].argval == chain.base else None
    return kind if isinstance(kind, type) else nn.Module


def _is_super(steps: Sequence[Step], i: int) -> bool:
    called = called_by(steps, i) if i > 0 else []
    return len(called) > 0 and called[0].opname == "LOAD_GLOBAL" and called[0].argval == "super"


def is_of_file(code: CodeType, chain: Chain, around: Mapping[str, Any], until: Sequence[str]) -> bool:
    """Whether what a chain names, until some names of it, is a file or a class, but none of modules.

    Args:
        code: The code.
        chain: The chain.
        around: The globals of the code.
        until: The last names of the chain.
    """
    steps = instructions(code)
    start = chain.start + 1 if steps[chain.start].argval in _BY_TEXT else chain.start - 1
    named = start >= 0 and chain.base is None and steps[start].opname == "LOAD_GLOBAL"
    ends = next((k for k in range(start + 1, chain.end + 1) if steps[k].argval in until), start + 1)
    value = attribute_of(steps[start:ends], around) if named else None
    return isinstance(value, (type, ModuleType)) and not (isinstance(value, type) and issubclass(value, nn.Module))


def _gives_other(steps: Sequence[Step], i: int) -> bool:
    """Whether a function is called on something else than a variable, or an attribute of one."""
    k = i + 1
    variable = steps[k].opname.startswith(("LOAD_FAST", "LOAD_DEREF"))
    while variable and steps[k + 1].opname == "LOAD_ATTR":
        k += 1
    called = called_by(steps, taken(steps, i))[:1] == (steps[i],)
    return called and not (variable and is_argument(steps, k))


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
