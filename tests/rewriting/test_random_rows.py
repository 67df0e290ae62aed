"""On random texts, whatever waits is called where the text calls it, and nothing that waits is ever seen."""

from __future__ import annotations

import itertools
import linecache
import random
from collections.abc import Callable
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from normfree.layers.pairs import Held
from normfree.rewriting import rows
from normfree.rewriting.rows import rows_in, with_rows

LAYERS = ("self.a", "self.b", "self.c", "self.parts[0]", "self.parts[1]")
TESTS = ("self.flag", "not self.flag", "self.other and self.flag", "self.other", "len([1]) > 0 and self.flag")


class Step(nn.Module):
    """Notes that it was called."""

    calls: ClassVar[list[int]] = []

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(self.times)
        return x * self.times + self.times


class Base(nn.Module):
    def __init__(self, flag: bool, other: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = Step(2), Step(3), Step(5)
        self.parts = nn.ModuleList([Step(7), Step(11)])
        self.flag, self.other = flag, other


class Text:
    """A random method of three variables, from a seed."""

    def __init__(self, seed: int) -> None:
        self.by = random.Random(seed)  # noqa: S311  # no secret
        lines = [*self.block(0, self.by.randint(3, 8)), f"return {self.by.choice(('x + y + z', 'x', self.call()))}"]
        self.text = "import torch\n\n\nclass Net(Base):\n    def forward(self, x, y, z):\n        keep, w = [], 1\n"
        self.text += "".join(f"        {line}\n" for line in lines)
        self.file = f"<random text {seed}>"

    def method(self) -> Any:
        """Return the method, whose text is known as that of a notebook's cell is."""
        linecache.cache[self.file] = len(self.text), None, self.text.splitlines(keepends=True), self.file
        scope: dict[str, Any] = {"Base": Base}
        exec(compile(self.text, self.file, "exec"), scope)  # noqa: S102  # our own
        return scope["Net"].forward

    def call(self, depth: int = 0) -> str:
        layer, name = self.by.choice(LAYERS), self.by.choice("xyz")
        inner = f"{layer}({self.call(depth + 1)})" if depth < 2 else f"{layer}({name})"
        ways = [f"{layer}({name})"] * 6 + [inner] * 3
        ways += [f"{layer}({name} + 1)", f"torch.sub({layer}({name}), 2)", f"{layer}({name}) + {self.by.choice('xyz')}"]
        return self.by.choice(ways)

    def block(self, depth: int, count: int) -> list[str]:
        return [line for _ in range(count) for line in self.statement(depth)]

    def inside(self, head: str, depth: int) -> list[str]:
        return [head, *(f"    {line}" for line in self.block(depth + 1, self.by.randint(1, 2)))]

    def statement(self, depth: int) -> list[str]:
        name, test = self.by.choice("xyz"), self.by.choice(TESTS)
        plain = [f"{name} = {self.call()}"]
        if depth > 2 or self.by.random() < 0.6:
            return plain
        ways: list[Callable[[], list[str]]] = [
            lambda: self.inside(f"if {test}:", depth),
            lambda: [*self.inside(f"if {test}:", depth), *self.inside("else:", depth)],
            lambda: self.inside("for i in range(2):", depth),
            lambda: self.inside("with torch.no_grad():", depth),
            lambda: [*self.inside("try:", depth), "except ZeroDivisionError:", "    x = y"],
            lambda: [*self.inside("while self.flag and len(keep) < 2:", depth), "    keep.append(x)"],
            lambda: [f"{name} += {self.call()}"],
            lambda: [f"{name} = {self.call()} if {test} else {self.call()}"],
            lambda: [
                f"{name} = {self.call()}",
                f"if {test}:",
                f"    {name} = {self.call()}",
                f"{name} = self.c({name})",
            ],
            lambda: [f"{name} = {self.call()}; x = {self.call()}"],
            lambda: [f"keep.append({name})"],
            lambda: ["w = None"],
            lambda: ["x, y = y, x"],
            lambda: ["late = lambda: x"],
            lambda: ["def inner():", "    return y", f"{name} = inner()"],
            lambda: [f"{name} = [self.a({name}) for {name} in (x, z)][0]"],
            lambda: [f"self.last = {self.call()}", f"{name} = self.b(self.last)"],
            lambda: ["del z", "z = self.c(x)"],
            lambda: [f"if {test}:", "    return y"],
        ]
        return self.by.choice(ways)()


def wait(first: Any, second: Any, x: Any) -> Held:
    """Let everything wait, as if every two layers were a pair."""
    return Held(first, second, x)


def end(second: Any, x: Any) -> Any:
    if not isinstance(x, Held):
        return second(x)
    assert x.second is second
    return second(x.first(x.x))


def outcome(method: Any, flag: bool, other: bool) -> tuple[str, list[int]]:
    Step.calls.clear()
    try:
        out = str(method(Base(flag, other), *map(torch.tensor, (1.0, 2.0, 3.0))))
    except UnboundLocalError:
        out = "a variable has no value"
    return out, list(Step.calls)


def hold(seed: int) -> int:
    """Hold every row of a text, and all of them, to the text; return how many there are."""
    text = Text(seed)
    method = text.method()
    keys = [row.key for row in rows_in(method)]
    with patch.dict(rows._HELPERS, {"_normfree_held": wait, "_normfree_taken": end}):
        for chosen in [*({key} for key in keys), set(keys)]:
            changed = with_rows(method, frozenset(chosen))
            for flags in itertools.product((False, True), repeat=2):
                assert outcome(changed, *flags) == outcome(method, *flags), f"{chosen}\n{text.text}"
    linecache.cache.pop(text.file)
    return len(keys)


@pytest.mark.parametrize("first", [0, 50, 100, 150])
def test_a_random_text_does_what_it_did(first: int) -> None:
    assert sum(map(hold, range(first, first + 50))) > 50


@pytest.mark.broad
@pytest.mark.parametrize("first", range(200, 10200, 500))
def test_ten_thousand_random_texts_do_what_they_did(first: int) -> None:
    assert sum(map(hold, range(first, first + 500))) > 500
