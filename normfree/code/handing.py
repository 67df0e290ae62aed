"""Which modules a function may be given by others, and what it then takes out of them without naming it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from itertools import chain
from types import CodeType, FunctionType
from typing import NamedTuple

from torch import nn

from normfree.code.asking import Fate, fate_inside
from normfree.code.bytecode import instructions
from normfree.code.chains import ANY, Chain, kind_behind
from normfree.code.functions import codes_of, is_dunder, names_in, tells_nothing
from normfree.code.reach import Function, functions_named_by
from normfree.code.using import calls_variable, contained, uses_called
from normfree.code.words import leads_deep

__all__ = ["Handed"]


class _Taking(NamedTuple):
    """Some code takes parts of a module, or of any it was given: at any depth, or those whose names begin so."""

    code: CodeType
    module: nn.Module | None
    kind: type
    deep: bool
    written: str

    def holders(self, given: Iterable[nn.Module]) -> Iterator[nn.Module]:
        """Yield what parts are taken of."""
        for module in chain(*map(contained, given)) if self.module is None else (self.module,):
            if isinstance(module, self.kind):
                yield from module.modules() if self.deep else (module,)

    def parts(self, holder: nn.Module) -> list[nn.Module]:
        """Return what is taken of a module."""
        return [m for name, m in holder._modules.items() if m is not None and name.startswith(self.written)]


class Handed:
    """What functions hand on to those that they name; what is called by no name may be given whatever is handed on."""

    def __init__(self, model: nn.Module, held: Iterable[nn.Module]) -> None:
        self._known = {model, *held}  # to whoever has the model
        self._values: dict[FunctionType, set[nn.Module]] = defaultdict(set)
        self._results: dict[FunctionType, set[nn.Module]] = defaultdict(set)
        self._takings: dict[FunctionType, list[tuple[_Taking, Fate]]] = defaultdict(list)

    def hand_on(self, function: Function, modules: Iterable[nn.Module]) -> None:
        """Note that a function does something with modules as values, which may be to hand them on."""
        self._values[function.whole].update(modules)

    def hand_out(self, function: Function, module: nn.Module) -> None:
        """Note that a function returns a module."""
        self._results[function.whole].add(module)

    def take(self, function: Function, at: Chain, names: tuple[str, ...], module: nn.Module | None = None) -> None:
        """Note that a function takes parts of a module, or of whatever it was given.

        Args:
            function: The function.
            at: Where it does so.
            names: The last names of that.
            module: The module, if it is known.
        """
        fate = fate_inside(at, names, function)
        fails = function.broken and not calls_variable(function.code, result=True)
        if fate is not Fate.ASKED and not fails:
            kind = kind_behind(function.code, at, function.whole.__globals__) if module is None else nn.Module
            written = names[0].removesuffix(ANY) if names[0].endswith(ANY) else ""
            taking = _Taking(function.code, module, kind, leads_deep(names[0]), written)
            self._takings[function.whole].append((taking, fate))

    def taken(self, functions: Iterable[Function]) -> Iterator[tuple[nn.Module, CodeType, list[nn.Module]]]:
        """Yield what is taken, as a module, by which code, and which parts of it."""
        if not self._takings:
            return
        read = {function.whole: function for function in functions}
        names = {f: names_in(f) for f in read}
        known = {name for own in names.values() for name in own}
        leads = {f: functions_named_by(f, names[f], read) for f in read}
        silent = _silent(read, names, leads)
        called = {f for f in read if not known.isdisjoint(read[f].names) or any(map(is_dunder, read[f].names))}
        takings = {
            f: [taking for taking, fate in found if fate is Fate.USED or f in called]
            for f, found in self._takings.items()
            if f not in silent
        }
        given = self._spread(leads, takings, read, known, silent)
        for f, found in takings.items():
            for taking in found:
                for holder in taking.holders(given[f] | self._values[f]):
                    yield holder, taking.code, taking.parts(holder)

    def _spread(
        self,
        leads: Mapping[FunctionType, Set[FunctionType]],
        takings: Mapping[FunctionType, list[_Taking]],
        read: Mapping[FunctionType, Function],
        known: Set[str],
        silent: Set[FunctionType],
    ) -> dict[FunctionType, set[nn.Module]]:
        """Return what functions are given, by others or as what these return."""
        given = {f: set[nn.Module]() for f in leads}
        anything = self._known.union(*self._values.values())
        for f, function in read.items():
            if function.of_object or (function.owner_name is None and known.isdisjoint(function.names)):
                given[f] |= anything
        back = {f: [caller for caller, called in leads.items() if f in called] for f in leads}
        waiting = [f for f in leads if f not in silent]
        while waiting:
            f = waiting.pop()
            own = given[f] | self._values[f]
            items = {m for taking in takings.get(f, ()) for holder in taking.holders(own) for m in taking.parts(holder)}
            on = (items | own).union(*map(contained, given[f]))
            for other, more in [(g, on) for g in leads[f]] + [(g, items | self._results[f]) for g in back[f]]:
                if other not in silent and not more <= given[other]:
                    given[other] |= more
                    waiting.append(other)
        return given


def _silent(
    read: Mapping[FunctionType, Function],
    names: Mapping[FunctionType, Set[str]],
    leads: Mapping[FunctionType, Set[FunctionType]],
) -> set[FunctionType]:
    """Return the functions that may call what they like: they return nothing, and nothing is kept of it."""
    keeping = {
        f
        for f in read
        if not names[f].isdisjoint(_KEEPING)
        or any(step.opname.startswith(_STORES) for code in codes_of(f.__code__) for step in instructions(code))
        or any(map(uses_called, codes_of(f.__code__)))
    }
    while more := {f for f in leads if f not in keeping and not keeping.isdisjoint(leads[f])}:
        keeping |= more
    return {f for f in read if f not in keeping and not read[f].forward and tells_nothing(f)}


_STORES = ("STORE_ATTR", "STORE_SUBSCR", "STORE_GLOBAL", "STORE_DEREF", "STORE_SLICE")
_KEEPING = {"setattr", "append", "extend", "insert", "update", "setdefault", "add", "put", "copy_", "set_", "print"}
_KEEPING |= {"register_forward_hook", "register_forward_pre_hook", "register_buffer"}
"""By these something is kept, or shown."""
