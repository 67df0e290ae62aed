"""Which layers some code names besides the calls that were seen: on a path that no run took it may use them apart.

What can name a layer is what the model holds, and the functions of its classes with those that they name in turn. Left
out is what only building a model runs, what reads the statistics of a norm, which fails once there are none, and what
no forward comes to and hands a layer out: whoever asks for it could take it himself.
"""

from __future__ import annotations

import inspect
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import CodeType

from torch import nn

from normfree.code.asking import Fate, fate_of, hands_on
from normfree.code.branching import is_run_whole
from normfree.code.bytecode import index_of, instructions
from normfree.code.chains import Chain, is_of_file
from normfree.code.chains import chains as chains_of
from normfree.code.handing import Handed
from normfree.code.holding import reached
from normfree.code.opening import Opened
from normfree.code.reach import Function
from normfree.code.straight import comes_elsewhere, passes_on, shared
from normfree.code.using import calls_variable, contained, is_argument, is_read, is_test, part_of, takes_some
from normfree.code.words import holds, leads_in, looks_at_variables, may_take_any, meaning
from normfree.tracing.callers import Call, Place

__all__ = ["Named", "find_named"]


@dataclass
class Named:
    """Identities of modules that are called, or of which a parameter is read by its name, besides what was seen.

    With them come pairs of which each may be called without the other.
    """

    called: set[int] = field(default_factory=set)
    read: dict[str, set[int]] = field(default_factory=lambda: {"weight": set(), "bias": set()})
    pairs: set[tuple[int, int]] = field(default_factory=set)


def find_named(model: nn.Module, called: Mapping[int, tuple[Call, ...]], pairs: Mapping[int, frozenset[int]]) -> Named:
    """Return what a model's code and what it holds name.

    Args:
        model: The model.
        called: The calls that were seen of each layer and norm in question, and of what they stand in, by identity.
        pairs: The identity of each layer, and of what returns what it does, with those of the norm that would go into
            it and of what begins with that.
    """
    held, functions = reached(model)
    reading = _Reading(model, called, pairs, Named(set(held.called), held.read))
    for function in functions:
        reading.read(function)
    reading.finish(functions)
    return reading.named


class _Reading:
    """Reads one function after another."""

    def __init__(
        self,
        model: nn.Module,
        called: Mapping[int, tuple[Call, ...]],
        pairs: Mapping[int, frozenset[int]],
        named: Named,
    ) -> None:
        self.model, self.named = model, named
        self.called, self.pairs = called, pairs
        self.backs: dict[int, set[int]] = defaultdict(set)
        for front, backs in pairs.items():
            for back in backs:
                self.backs[back].add(front)
        self.instances: dict[type, list[nn.Module]] = defaultdict(list)
        self.by_name: dict[str, list[nn.Module]] = defaultdict(list)
        for module in model.modules():
            for cls in type(module).__mro__:
                self.instances[cls].append(module)
            for name, child in module._modules.items():
                if child is not None:
                    self.by_name[name].append(child)
        self.opened = Opened(pairs, self.backs)
        self.loose = False  # some forward reads the weight of what it was handed
        self.handed: dict[str, set[int]] = defaultdict(set)  # what functions hand out, by their names
        self.names: Counter[str] = Counter()
        self.loads: Counter[object] = Counter()
        self.given = Handed(model, (module for module in model.modules() if id(module) in named.called))

    def read(self, function: Function) -> None:
        """Note what one function names."""
        steps, chains = instructions(function.code), chains_of(function.code)
        leads, follows = set[tuple[int, int]](), set[tuple[int, int]]()  # calls of two that go together, one by one
        around = function.whole.__globals__
        keeps = not function.broken or calls_variable(function.code)
        uses = [(chain, *use) for chain in chains for use in self._uses(chain, function)]
        ends = {(chain.end, id(module)): chain for chain, module, _ in uses}
        self.opened.mentioned.update((id(module), function.code) for _, module, _ in uses)
        others = (chain for chain in chains if chain.base != function.owner_name)
        self.loose |= function.forward and any(chain.names[0] in ("weight", "bias") for chain in others)
        for chain, module, rest in uses:
            norms = self.pairs.get(id(module), frozenset())
            if not rest and chain.calls and norms:
                then = passes_on(function.code, chain, norms, ends)
                if then is not None:
                    leads.add((chain.end, id(module)))
                    follows.add(then)
        put = {id(below) for chain, module, rest in uses if chain.puts and not rest for below in module.modules()}
        for chain, module, rest in uses:
            if rest:
                self._read_attribute(chain, module, rest, function)
            elif chain.puts:  # something else comes in its place, and not in that of what goes with it
                together = {id(module), *self.pairs.get(id(module), ()), *self.backs[id(module)]}
                self.named.called |= set() if function.broken or put >= together else {id(module)}
            elif chain.calls or is_run_whole(steps, chain.start, chain.value, around):
                if not self._was_seen(module, function.code, chain, chains):
                    here = chain.end, id(module)
                    self._call(id(module), here in leads, here in follows)
            elif not is_test(steps, chain.value + 1):
                whole = function.forward and holds(module)
                fate = Fate.USED if whole else fate_of(function.code, chain.value, around, holds=holds(module))
                inner = function.code is not function.whole.__code__
                if fate is Fate.ASKED or not keeps or (fate is Fate.HANDED_OUT and function.broken):
                    continue
                if fate is Fate.HANDED_OUT and not (function.forward or inner):
                    self.handed[function.code.co_name].add(id(module))
                    self.given.hand_out(function, module)
                    continue
                part = part_of(module, steps[chain.end + 1 : chain.end + 3])
                if part is None:
                    self._use(module)
                self.given.hand_on(function, [module] if is_argument(steps, chain.value) else contained(module))
                if holds(module):
                    self.opened.open(module, function.code, None if part is None else [part])
                    owners = self.instances[function.owner] if function.owner is not None else []
                    self.opened.go_through(module, chain, function, owners)
                    if function.forward and takes_some(steps, chain.end):
                        self.named.called.update(map(id, module._modules.values()))
        for chain in chains:
            self.opened.changed.update(chain.names[: None if chain.puts or not is_read(steps, chain.end) else -1])
        self.names.update(set(function.code.co_names))
        self.loads.update(s.argval for s in steps if s.opname.startswith("LOAD_") and s.opname != "LOAD_CONST")
        owners = self.instances.get(function.owner, []) if function.owner else []
        if owners and hands_on(function.code, function.owner_name, around):
            self.given.hand_on(function, owners)
        self._read_texts(function)

    def _read_attribute(self, chain: Chain, module: nn.Module, rest: tuple[str, ...], function: Function) -> None:
        """Note what an attribute of a module, or of what it holds, leads to."""
        said = meaning(chain, module, rest, function)
        if said in self.named.read:
            self.named.read[said].add(id(module))
        elif said == "parameters":
            for read in self.named.read.values():
                read.update(map(id, module.modules()))
        elif said == "use":
            self.named.called.add(id(module))
        elif said == "change":
            self.named.called.update(map(id, module._modules.values()))
        elif said:
            self.given.take(function, chain, rest, module)

    def _read_texts(self, function: Function) -> None:
        """Note what a text may lead to, or whoever looks at the variables of a function."""
        if may_take_any(function.code):
            starts = self.instances.get(function.owner, []) if function.owner else [self.model]
            self.named.called.update(id(below) for start in starts for below in start.modules())
        if looks_at_variables(function.code):
            for module, calls in self.called.items():
                if any(place.code is function.code for call in calls for place in call.places):
                    self.named.called.add(module)

    def _uses(self, chain: Chain, function: Function) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
        """Yield the modules that a chain of names may end at, each with the names that are left."""
        own, around = chain.base is not None and chain.base == function.owner_name, function.whole.__globals__
        home = self.instances.get(function.owner) if own and function.owner else None
        first = (
            1 if own and home is None else 0
        )  # what an object holds is known, and whose class is none of the model's
        known = next((i for i, n in enumerate(chain.names) if i >= first and n in self.by_name), None)
        inside = next((i for i, n in enumerate(chain.names) if i >= own and leads_in(n, unknown=True)), None)
        if known is None and inside is not None and not is_of_file(function.code, chain, around):
            self.given.take(function, chain, chain.names[inside:])
        if home is None and known is None:
            return
        starts = home or self.by_name[chain.names[known or 0]]
        names = chain.names if home else chain.names[(known or 0) + 1 :]
        for start in starts:
            module, rest = start, names
            while rest and module._modules.get(rest[0]) is not None:
                module, rest = module._modules[rest[0]], rest[1:]  # type: ignore[assignment]  # it is no None
            if rest != chain.names or (rest[:1] and leads_in(rest[0])):
                yield module, rest

    def _was_seen(self, module: nn.Module, code: CodeType, chain: Chain, chains: tuple[Chain, ...]) -> bool:
        """Whether the call that a chain ends in is the one that was seen."""
        for call in self.called.get(id(module), ()):
            for place, inner in zip(call.places, (*call.places[1:], None), strict=True):
                if place.code is code and _calls(call, inner, module):
                    at = index_of(place)
                    same = [c for c in chains if c.names[-1:] == chain.names[-1:] and chain.end < c.end <= at]
                    if chain.end < at and not same:
                        return True
        return id(module) not in self.called

    def _call(self, layer: int, leads: bool, follows: bool) -> None:
        """Note a call that no run came to, and whether what goes behind the layer, and before it, is called with it."""
        if leads or follows:
            self.named.pairs |= {(layer, back) for back in self.pairs.get(layer, ()) if not leads}
            self.named.pairs |= {(front, layer) for front in self.backs[layer] if not follows}
        else:
            self.named.called.add(layer)

    def _use(self, module: nn.Module) -> None:
        """Note that somebody has a layer, and may do with it and its parameters what he likes."""
        for noted in (self.named.called, *self.named.read.values()):
            noted.add(id(module))

    def finish(self, functions: list[Function]) -> None:
        """Note what is held by what somebody goes through, but for where only that led to the calls that were seen."""
        for name, modules in self.handed.items():
            self.named.called |= modules if self.names[name] else set()
        asked = {*self.pairs, *self.backs} - self.named.called
        for module, code, parts in self.given.taken(functions) if asked else ():
            self.opened.open(module, code, parts)
        self.named.called |= self.opened.reached(self.called)
        self.named.pairs |= self.opened.broken
        for layer, norms in self.pairs.items():
            for norm in norms:
                for call in self.called[layer]:
                    if comes_elsewhere(call, max(self.called[norm], key=partial(shared, call)), self.loads):
                        self.named.pairs.add((layer, norm))
        if self.loose:
            for read in self.named.read.values():
                read.update(self.named.called)


def _calls(call: Call, inner: Place | None, module: nn.Module) -> bool:
    """Whether it is the call of a module that has brought a function where it stands, and ``inner`` to run."""
    forward = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    around = any(place.code is forward for place in call.places)  # else it is the layer itself
    return around == (inner is not None) and (inner is None or inner.code is forward)
