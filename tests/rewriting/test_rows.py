"""Calls in a row are found in the text of a method, and only there where nobody reads what passes between."""

from __future__ import annotations

import ast
import importlib.util
import linecache
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfree.code.text import tree_of
from normfree.layers import pairs
from normfree.rewriting.rows import rows_in, text_with, with_rows

SCALE = 3


class Rows(nn.Module):
    """Methods in which ``self.b`` is called on what ``self.a`` has returned, and on nothing else."""

    def __init__(self, flag: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c, self.flag = nn.Tanh(), nn.Sigmoid(), nn.Softplus(), flag

    def same_name(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.b(x)
        return x + 1

    def other_name(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.b(y)
        return z + x

    def nested(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x - 1))

    def returned(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x)

    def within_a_function(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return F.relu(self.b(x) - 0.5, inplace=True)

    def with_a_method(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x).flatten(1).sum(1)

    def asked(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.flag and SCALE > 2:
            x = self.b(x)
            x = x + 1
        else:
            x = x - 1
        return x

    def past_what_is_not_there(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if not self.flag:
            x = self.c(x)
        x = self.b(x)
        return x * 2

    def in_a_loop(self, x: Tensor) -> Tensor:
        for first, second in ((self.a, self.b), (self.b, self.c)):
            x = first(x)
            x = second(x)
        return x

    def three(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(self.c(x))

    def cleared(self, x: Tensor) -> Tensor:
        y = self.a(x)
        x = None  # type: ignore[assignment]  # as torch.fx writes it
        z = self.b(y)
        y = None
        return z

    def with_defaults(self, x: Tensor, *, times: int = SCALE) -> Tensor:
        x = self.a(x)
        return self.b(x) * times


ROWS = [value for value in vars(Rows).values() if isinstance(value, FunctionType) and value.__name__ != "__init__"]


@pytest.mark.parametrize("method", ROWS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("flag", [True, False])
def test_a_row_is_found_and_called_as_it_was(method: FunctionType, flag: bool) -> None:
    rows = rows_in(method)
    assert rows, "what is called in a row"
    changed, model, x = with_rows(method, frozenset(row.key for row in rows)), Rows(flag), torch.randn(2, 3)
    assert torch.equal(changed(model, x), method(model, x))
    assert changed.__name__ == method.__name__
    assert changed.__qualname__ == method.__qualname__
    assert changed.__kwdefaults__ == method.__kwdefaults__
    assert changed.__code__.co_firstlineno == method.__code__.co_firstlineno


@pytest.mark.parametrize("method", ROWS, ids=lambda m: m.__name__)
def test_the_first_waits_for_the_second(method: FunctionType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[nn.Module, nn.Module]] = []

    def noted(first: Any, second: Any, x: Tensor) -> Any:
        calls.append((first, second))
        return pairs.Held(first, second, x)

    monkeypatch.setitem(__import__("normfree.rewriting.rows").rewriting.rows._HELPERS, "_normfree_held", noted)
    rows = {row.key: ast.unparse(row.second.func) for row in rows_in(method)}
    keys = frozenset(key for key, second in rows.items() if second == "self.b") or frozenset(rows)
    changed, model, x = with_rows(method, keys), Rows(True), torch.randn(2, 3)
    assert torch.equal(changed(model, x), method(model, x))
    assert calls


class Apart(Rows):
    """Methods in which somebody else may read what passes, or something is decided in between."""

    last: Any = None

    def read_later(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.b(y)
        return z + y

    def added_to_later(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.b(y)
        y += 1  # which nobody reads, but a tensor it must be
        return z

    def read_by_a_closure(self, x: Tensor) -> Tensor:
        y = self.a(x)
        late = lambda: y  # noqa: E731  # what is tested
        return self.b(y) + late()

    def read_by_a_generator(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.b(x)
        return sum(x[i] for i in range(2))  # type: ignore[return-value]

    def kept(self, x: Tensor) -> Tensor:
        self.last = self.a(x)
        return self.b(self.last)

    def past_something_else(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if not self.flag:
            x = self.c(x)
        elif SCALE > 1:
            x = x + 1
        return self.b(x)

    def past_what_asks_a_function(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if torch.is_grad_enabled():
            x = x + 1
        return self.b(x)

    def asked_of_it(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if x.sum() > 0:
            x = self.b(x)
        return x

    def second_computes_first(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return x.add_(1) + self.b(y)

    def twice(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x) + x

    def option(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x) if self.flag else x

    def deleted(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.b(y)
        del y
        return z

    def looked_at(self, x: Tensor) -> Any:
        x = self.a(x)
        x = self.b(x)
        return locals()["x"]

    def more_than_one(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(*[x])

    def with_words(self, x: Tensor) -> Tensor:
        x = self.a(input=x)
        return self.b(x)

    def returned_by_another(self, x: Tensor) -> Tensor:
        return self.b(self.part(x))

    def part(self, x: Tensor) -> Tensor:
        return self.a(x)


APART = [value for name, value in vars(Apart).items() if isinstance(value, FunctionType) and name != "part"]


@pytest.mark.parametrize("method", APART, ids=lambda m: m.__name__)
def test_what_may_be_read_or_decided_between_is_no_row(method: FunctionType) -> None:
    found = [(ast.unparse(row.first.func), ast.unparse(row.second.func)) for row in rows_in(method)]
    assert ("self.a", "self.b") not in found


def test_a_file_that_was_edited_since_has_no_text(tmp_path: Path) -> None:
    path = tmp_path / "edited.py"
    path.write_text("class Net:\n    def forward(self, x):\n        return self.b(self.a(x))\n")
    spec = importlib.util.spec_from_file_location("edited", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    path.write_text("class Net:\n    def forward(self, x):\n        return self.b(self.a(x) + 1)\n")
    linecache.checkcache(str(path))
    assert tree_of(module.Net.forward) is None
    assert rows_in(module.Net.forward) == ()
    with pytest.raises(ValueError, match=r"the text of Net\.forward is not known"):
        with_rows(module.Net.forward, frozenset())


def test_what_was_never_written_has_no_text() -> None:
    scope: dict[str, Any] = {}
    exec("def forward(self, x):\n    return self.b(self.a(x))\n", scope)  # noqa: S102  # our own
    assert rows_in(scope["forward"]) == ()


class Base(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def closed_over(times: int) -> type[nn.Module]:
    class Closed(Base):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Tanh(), nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            x = self.b(x)
            return super().forward(x) * times

    return Closed


def test_what_a_method_takes_from_around_it_stays() -> None:
    kind = closed_over(5)
    method: Any = kind.forward
    changed = with_rows(method, frozenset(row.key for row in rows_in(method)))
    x = torch.randn(2, 3)
    assert torch.equal(changed(kind(), x), kind()(x))


class Fails(Rows):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.b(x)
        raise ValueError("here")


def test_an_error_says_the_line_that_it_always_said() -> None:
    lines = []
    for method in (Fails.forward, with_rows(Fails.forward, frozenset(row.key for row in rows_in(Fails.forward)))):
        with pytest.raises(ValueError, match="here") as caught:
            method(Fails(), torch.randn(2, 3))
        frame = traceback.extract_tb(caught.value.__traceback__)[-1]
        lines.append((frame.filename, frame.lineno, frame.line))
    assert lines[0] == lines[1]
    assert lines[0][2] == 'raise ValueError("here")'


def test_the_text_of_a_graph_is_changed_too() -> None:
    model = nn.Sequential(nn.Tanh(), nn.Sigmoid())
    graph = torch.fx.symbolic_trace(model).graph
    code = graph.python_code("self")
    scope: dict[str, Any] = dict(code.globals)
    text = text_with(code.src, scope)
    assert "_normfree_held" in text
    exec(text, scope)  # noqa: S102  # our own
    forward: Callable[..., Tensor] = scope["forward"]
    x = torch.randn(2, 3)
    assert torch.equal(forward(model, x), model(x))
