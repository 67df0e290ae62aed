"""Which layers some code names besides the calls that were seen: on a path that no run took it may use them apart.

What can name a layer is what the model holds, and the functions of its classes with those that they name in turn. Left
out is what only building a model runs, what reads the statistics of a norm, which fails once there are none, and what
no forward comes to and hands a layer out: whoever asks for it could take it himself.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from dis import Instruction
from types import CodeType

from torch import nn

from normfree.code.bytecode import index_of, instructions, is_plain, loads_method
from normfree.code.holding import held
from normfree.code.reach import Function, functions_of
from normfree.code.straight import is_dead
from normfree.code.using import calls_variable, is_used, part_of
from normfree.tracing.callers import Call

__all__ = ["Named", "find_named"]

_ALL = {
    "_modules",
    "children",
    "named_children",
    "modules",
    "named_modules",
    "get_submodule",
    "__dict__",
    "__getattr__",
}
_ALL |= {"values", "items", "forward", "__call__", "_conv_forward", "__iter__", "__getitem__"}
"""Attributes by which one comes to anything that a module holds, or calls it by another way."""
_TESTS = ("POP_JUMP_IF_NONE", "POP_JUMP_IF_NOT_NONE", "POP_JUMP_FORWARD_IF_NONE", "POP_JUMP_FORWARD_IF_NOT_NONE")


@dataclass
class Named:
    """Identities of modules that are called, or of which a parameter is read by its name, besides what was seen."""

    called: set[int] = field(default_factory=set)
    read: dict[str, set[int]] = field(default_factory=lambda: {"weight": set(), "bias": set()})


@dataclass(frozen=True)
class _Chain:
    """``base.a.b.c`` in some bytecode, from one instruction to another; it ends in a call or is taken as a value."""

    start: int
    end: int
    base: str | None
    names: tuple[str, ...]
    calls: bool


def find_named(model: nn.Module, called: Mapping[int, tuple[Call, ...]], pairs: Mapping[int, frozenset[int]]) -> Named:
    """Return what a model's code and what it holds name.

    Args:
        model: The model.
        called: The calls that were seen of each layer and norm in question, and of what they stand in, by identity.
        pairs: The identity of each layer, and of what returns what it does, with those of the norm that would go into
            it and of what begins with that.
    """
    reading = _Reading(model, called, pairs)
    for function in functions_of(model, reading.found_functions):
        reading.read(function)
    reading.finish()
    return reading.named


class _Reading:
    """Reads one function after another."""

    def __init__(
        self, model: nn.Module, called: Mapping[int, tuple[Call, ...]], pairs: Mapping[int, frozenset[int]]
    ) -> None:
        called_elsewhere, read_elsewhere, self.found_functions = held(model)
        self.named = Named(called_elsewhere, read_elsewhere)
        self.called, self.pairs = called, pairs
        self.instances: dict[type, list[nn.Module]] = defaultdict(list)
        self.by_name: dict[str, list[nn.Module]] = defaultdict(list)
        for module in model.modules():
            for cls in type(module).__mro__:
                self.instances[cls].append(module)
            for name, child in module._modules.items():
                if child is not None:
                    self.by_name[name].append(child)
        self.opened: Counter[tuple[int, CodeType]] = Counter()
        self.mentioned: Counter[tuple[int, CodeType]] = Counter()
        self.loose = False  # some forward reads the weight of what it was handed
        self.holders: dict[int, nn.Module] = {}
        self.parts: dict[tuple[int, CodeType], set[int]] = defaultdict(set)  # which of what they hold is taken

    def read(self, function: Function) -> None:
        """Note what one function names."""
        steps, chains = instructions(function.code), _chains(function.code)
        passed: set[tuple[int, int]] = set()  # calls of a norm right behind its layer
        keeps = not function.broken or calls_variable(function.code)
        uses = [(chain, *use) for chain in chains for use in self._uses(chain, function)]
        ends = {(chain.end, id(module)): chain for chain, module, _ in uses}
        self.mentioned.update((id(module), function.code) for _, module, _ in uses)
        local = (
            chain for chain in chains if chain.base != function.owner_name and chain.names[0] in ("weight", "bias")
        )
        self.loose |= function.forward and any(True for _ in local)
        for chain, module, rest in uses:
            norms = self.pairs.get(id(module), frozenset())
            if not rest and chain.calls and norms:
                behind = _passes_on(function.code, chain, norms, ends)
                if behind is not None:
                    passed |= {(chain.end, id(module)), behind}
        for chain, module, rest in uses:
            if rest:
                if rest[0] in ("weight", "bias") and function.forward:
                    self.named.read[rest[0]].add(id(module))
                elif rest[0] in _ALL and function.forward:
                    self._open(module, function.code)
            elif chain.calls:
                if (chain.end, id(module)) not in passed and not self._was_seen(module, function.code, chain, chains):
                    self.named.called.add(id(module))
            elif chain.start and steps[chain.start - 1].argval == "checkpoint":
                pass  # torch's, which calls it whole
            elif not _is_test(steps, chain.end + 1) and (
                function.forward or (keeps and is_used(steps, chain.end, hasattr(type(module), "__iter__")))
            ):
                part = part_of(module, steps[chain.end + 1 : chain.end + 3])
                if part is None:
                    self.named.called.add(id(module))
                if hasattr(type(module), "__iter__"):
                    self._open(module, function.code, part)

    def _uses(self, chain: _Chain, function: Function) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
        """Yield the modules that a chain of names may end at, each with the names that are left."""
        if chain.base is not None and chain.base == function.owner_name:
            starts, names = self.instances.get(function.owner, []) if function.owner else [], chain.names
        else:
            known = next((i for i, name in enumerate(chain.names) if name in self.by_name), None)
            if known is None:
                return
            starts, names = self.by_name[chain.names[known]], chain.names[known + 1 :]
        for start in starts:
            module, rest = start, names
            while rest and module._modules.get(rest[0]) is not None:
                module, rest = module._modules[rest[0]], rest[1:]  # type: ignore[assignment]  # it is no None
            if rest != chain.names or (rest[:1] and rest[0] in _ALL):
                yield module, rest

    def _was_seen(self, module: nn.Module, code: CodeType, chain: _Chain, chains: list[_Chain]) -> bool:
        """Whether the call that a chain ends in is the one that was seen."""
        for call in self.called.get(id(module), ()):
            for place in call.places:
                if place.code is code:
                    at = index_of(place)
                    same = [c for c in chains if c.names[-1:] == chain.names[-1:] and chain.end < c.end <= at]
                    if chain.end < at and not same:
                        return True
        return id(module) not in self.called

    def _open(self, module: nn.Module, code: CodeType, part: nn.Module | None = None) -> None:
        self.opened[id(module), code] += 1
        self.holders[id(module)] = module
        self.parts[id(module), code] |= {id(m) for m in module._modules.values()} if part is None else {id(part)}

    def finish(self) -> None:
        """Note what is held by what somebody goes through, but for where only that led to the calls that were seen."""
        for (holder, code), count in self.opened.items():
            for child in self.holders[holder]._modules.values():
                if id(child) not in self.parts[holder, code] and count == self.mentioned[holder, code]:
                    continue
                seen = (place.code for call in self.called.get(id(child), ()) for place in call.places)
                mentions = max(count, self.mentioned[holder, code]) + self.mentioned[id(child), code]
                if mentions > 1 or code not in seen:
                    self.named.called.add(id(child))
        if self.loose:
            for read in self.named.read.values():
                read.update(self.named.called)


def _chains(code: CodeType) -> list[_Chain]:
    steps, found, i = instructions(code), list[_Chain](), 0
    while i < len(steps):
        start, base = i, None
        if steps[i].opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and isinstance(steps[i].argval, str):
            base, i = steps[i].argval, i + 1
        names: list[str] = []
        calls = False
        while i < len(steps) and steps[i].opname in ("LOAD_ATTR", "LOAD_METHOD") and not calls:
            names.append(steps[i].argval)
            calls = loads_method(steps[i])
            i += 1
        if start and steps[start - 1].argval == "getattr" and base is not None and not calls:
            text = steps[i].argval if steps[i].opname == "LOAD_CONST" else "__dict__"  # any of them
            names, i = [*names, str(text)], i + 1
        if names:
            found.append(_Chain(start, i - 1, base, tuple(names), calls))
        else:
            i = start + 1
    return found


def _passes_on(
    code: CodeType, chain: _Chain, norms: frozenset[int], ends: Mapping[tuple[int, int], _Chain]
) -> tuple[int, int] | None:
    """Return where a norm is named, and its identity, whose call directly follows that of the layer in front of it."""
    steps = instructions(code)
    calls = [i for i in range(chain.end + 1, len(steps)) if steps[i].opname.startswith("CALL")][:2]
    if len(calls) < 2 or not is_plain(steps[chain.end + 1 : calls[0]]) or not is_plain(steps[calls[0] + 1 : calls[1]]):
        return None
    named = [(end, module) for end, module in ends if module in norms and ends[end, module].calls]
    between = [(end, module) for end, module in named if calls[0] < end < calls[1] or end == chain.start - 1]
    kept = [step.argval for step in steps[calls[0] : calls[1]] if step.opname.startswith("STORE_FAST")]
    dead = all(isinstance(name, str) and is_dead(code, name, calls[1]) for name in kept)
    return between[0] if len(between) == 1 and dead and steps[calls[1]].arg == 1 else None


def _is_test(steps: tuple[Instruction, ...], i: int) -> bool:
    """Whether a value is only asked whether it is there."""
    if steps[i].opname in _TESTS:
        return True
    none = steps[i].opname == "LOAD_CONST" and steps[i].argval is None
    return none and steps[i + 1].opname == "IS_OP"
