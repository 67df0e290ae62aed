"""The proof by bytecode says the same on every Python: on what 3.10 to 3.14 make of the same functions, each recorded.

``written.py`` has the functions, ``listings.json`` their instructions as :func:`normfree.code.bytecode.raw` gives them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
from torch import nn
from written import TEXT

from normfree.code import branching, bytecode, straight
from normfree.code.bytecode import Step, called_by, callee, raw, read
from normfree.tracing.callers import Call, Place

HERE = "here"
RECORDED: dict[str, dict[str, list[list[Any]]]] = json.loads(Path(__file__).with_name("listings.json").read_text())
VERSIONS = (*RECORDED, HERE)
MADE: dict[str, Any] = {}
exec(TEXT, MADE)  # noqa: S102  # our own text
CODES: dict[str, CodeType] = {name: made.__code__ for name, made in MADE.items() if hasattr(made, "__code__")}

TOGETHER = {
    "straight": True,
    "in_two_lines": True,
    "in_one_variable": True,
    "decided": False,
    "missing": True,
    "asked_of_the_norm": True,
    "by_keyword": True,
    "by_star": False,
    "by_two_stars": True,
    "kept": False,
    "walrus": False,
    "deleted": False,
    "caught": False,
    "with_something": False,
    "counted": True,
    "matched": False,
    "asserted": False,
    "scaled": False,
    "yielded": False,
}
"""Whether ``self.b`` is always called with what ``self.c`` returns, and nobody keeps that."""
IN_ONE_LISTING = ("straight", "in_two_lines", "missing", "asked_of_the_norm", "is_none", "by_number", "by_name")
IN_ONE_LISTING += ("through_a_helper", "constant", "kept", "deleted", "either", "by_two_stars")


class Owner(nn.Module):
    """What the functions are methods of."""

    def __init__(self) -> None:
        super().__init__()
        self.part: nn.Module | None = None


def as_made_by(version: str, name: str) -> list[Step]:
    if version == HERE:
        return raw(CODES[name])
    steps = (Step(*step) for step in RECORDED[version][name])
    return [step._replace(argval=tuple(step.argval)) if isinstance(step.argval, list) else step for step in steps]


def calls(steps: list[Step], name: str) -> list[Step]:
    """Return the calls of ``self.c`` or ``self.b``."""
    found = ((step, callee(called_by(steps, i))) for i, step in enumerate(steps) if step.opname.startswith("CALL"))
    return [step for step, function in found if function and function[-1].argval == name]


def together(monkeypatch: pytest.MonkeyPatch, name: str, steps: list[Step]) -> bool:
    for module in (bytecode, straight, branching):
        monkeypatch.setattr(module, "instructions", lambda code: tuple(steps))
    (layer,), (norm, *_) = calls(steps, "c"), calls(steps, "b")
    stored = (s.argval for s in steps if s.opname == "STORE_FAST" and layer.offset < s.offset < norm.offset)
    places = [Place(0, CODES[name], at.offset, (), Owner()) for at in (layer, norm)]
    holding = tuple(stored) if name != "in_one_variable" else ("x",)
    return straight.always_together(Call((places[0],), ()), Call((_holding(places[1], holding),), ()))


def _holding(place: Place, names: tuple[str, ...]) -> Place:
    return Place(place.frame, place.code, place.offset, names, place.owner)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", TOGETHER)
def test_whether_two_calls_go_together_is_told_the_same(
    monkeypatch: pytest.MonkeyPatch, version: str, name: str
) -> None:
    assert together(monkeypatch, name, list(read(as_made_by(version, name)))) == TOGETHER[name]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", [name for name, whether in TOGETHER.items() if whether])
def test_an_instruction_that_nobody_knows_is_no_proof(monkeypatch: pytest.MonkeyPatch, version: str, name: str) -> None:
    steps = list(read(as_made_by(version, name)))
    (layer,), (norm, *_) = calls(steps, "c"), calls(steps, "b")
    jumps = [(i, step.argval) for i, step in enumerate(steps) if step.jumps and name == "missing"]
    for i in range(steps.index(layer) + 1, steps.index(norm)):
        if any(jump < i and steps[i].offset < end for jump, end in jumps):
            continue  # what is never run there
        for unknown in ("SOMETHING_NEW", "LOAD_SOMETHING_NEW", "STORE_FAST_SOMEWHERE", "POP_JUMP_IF_SOMETHING"):
            other = [*steps[:i], steps[i]._replace(opname=unknown, argval="something"), *steps[i + 1 :]]
            assert not together_or_lost(monkeypatch, name, other), (i, unknown)


def together_or_lost(monkeypatch: pytest.MonkeyPatch, name: str, steps: list[Step]) -> bool:
    """The same, where it may be that the call of the norm is not even recognised any more."""
    return bool(calls(steps, "b")) and together(monkeypatch, name, steps)


def listing(steps: Iterator[Step]) -> list[tuple[object, ...]]:
    """Return instructions with what they are about, without where they stand."""
    read_steps = list(steps)
    where = {step.offset: i for i, step in enumerate(read_steps)}
    return [
        (s.opname, where[s.argval] if s.jumps else s.argval, s.is_jump_target, None if s.jumps else s.effect)
        for s in read_steps
    ]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", IN_ONE_LISTING)
def test_the_same_code_is_read_in_the_same_words(version: str, name: str) -> None:
    assert listing(read(as_made_by(version, name))) == listing(read(as_made_by("3.11", name)))


@pytest.mark.parametrize("name", CODES)
def test_what_was_recorded_is_what_this_python_makes(name: str) -> None:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if version in RECORDED:
        found, expected = (list(read(as_made_by(v, name))) for v in (HERE, version))
        assert [s.opname for s in found] == [s.opname for s in expected]


def test_an_attribute_of_super_is_one_of_the_module() -> None:
    """As Python 3.12 and later write ``super().children()``."""
    written = [
        Step("LOAD_GLOBAL", "super", 0, 2, False, False, 1, "super"),
        Step("LOAD_DEREF", "__class__", 1, 12, False, False, 1, "__class__"),
        Step("LOAD_FAST", "self", 0, 14, False, False, 1, "self"),
        Step("LOAD_SUPER_ATTR", "children", 5, 16, False, False, -1, "NULL|self + children"),
        Step("CALL", 0, 0, 20, False, False, -1, ""),
    ]
    steps = list(read(written))
    assert [(step.opname, step.argval) for step in steps[-2:]] == [("LOAD_METHOD", "children"), ("CALL", 0)]
    assert steps[2:3] == [step for step in steps if step.argval == "self"]
    assert [step.argval for step in callee(called_by(steps, 4))] == ["super", "__class__", "self", "children"]
