"""Which layers some code names besides the calls that were seen: on a path that no run took it may use them apart.

What can name a layer is what the model holds, and the functions of its classes with those that they name in turn. Left
out is what only building a model runs, what reads the statistics of a norm, which fails once there are none, and what
no forward comes to and hands a layer out: whoever asks for it could take it himself.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from normfree.code.asking import Fate, fate_of, values_of
from normfree.code.branching import is_run_whole
from normfree.code.bytecode import called_by, instructions
from normfree.code.chains import ANY, Chain
from normfree.code.chains import chains as chains_of
from normfree.code.failing import fails_by
from normfree.code.functions import is_dunder
from normfree.code.handing import Handed
from normfree.code.holding import reached
from normfree.code.opening import Opened
from normfree.code.paths import Paths
from normfree.code.reach import Function
from normfree.code.seen import was_seen
from normfree.code.sequences import calls_whole, calls_wholes
from normfree.code.straight import comes_elsewhere, passes_on, shared
from normfree.code.using import (
    calls_variable,
    contained,
    is_argument,
    is_read,
    is_test,
    part_of,
    taken,
    takes_own,
    takes_some,
)
from normfree.code.words import holds, looks_at_variables, may_take_any, meaning
from normfree.norms import is_norm
from normfree.tracing.callers import Call

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
        self.paths = Paths(model)
        self.opened = Opened(pairs, self.backs)
        self.loose = False  # some forward reads the weight of what it was handed
        self.handed: dict[str, set[int]] = defaultdict(set)  # what functions hand out, by their names
        self.names: Counter[str] = Counter()
        self.loads: Counter[object] = Counter()
        self.texts: set[str] = set()  # with which a name begins that is no written text
        self.given = Handed(model, (module for module in model.modules() if id(module) in named.called))

    def read(self, function: Function) -> None:
        """Note what one function names."""
        steps, chains = instructions(function.code), chains_of(function.code)
        leads, follows = set[tuple[int, int]](), set[tuple[int, int]]()  # calls of two that go together, one by one
        around = function.whole.__globals__
        keeps = not function.broken or calls_variable(function.code)
        uses = [(chain, *use) for chain in chains for use in self.paths.ends(chain, function, self.given)]
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
                if not was_seen(self.called.get(id(module)), module, function.code, chain, chains):
                    here = chain.end, id(module)
                    self._call(id(module), here in leads, here in follows)
            elif not is_test(steps, chain.value + 1):
                whole = function.forward and holds(module)
                fate = Fate.USED if whole else fate_of(function.code, chain.value, around, holds=holds(module))
                inner = function.code is not function.whole.__code__
                if fate is Fate.ASKED or (fate is Fate.HANDED_OUT and function.broken):
                    continue
                given = called_by(steps, taken(steps, chain.value)) if is_argument(steps, chain.value) else ()
                if not keeps and (not given or fails_by(given, function.owner_name, function.owner, around)):
                    continue
                if fate is Fate.HANDED_OUT and not (function.forward or inner):
                    for name in function.names:
                        self.handed[name].add(id(module))
                    self.given.hand_out(function, module)
                    continue
                part = part_of(module, steps[chain.end + 1 : chain.end + 3])
                if part is None:
                    self._use(module)
                self.given.hand_on(function, [module] if is_argument(steps, chain.value) else contained(module))
                if holds(module):
                    self._go_through(module, part, chain.value, function)
                    owners = self.paths.instances[function.owner] if function.owner is not None else []
                    self.opened.go_through(module, chain, function, owners)
                    if function.forward and takes_some(steps, chain.end):
                        self.named.called.update(map(id, module._modules.values()))
        for chain in chains:
            self.opened.changed.update(chain.names[: None if chain.puts or not is_read(steps, chain.end) else -1])
        self.names.update(set(function.code.co_names))
        self.loads.update(s.argval for s in steps if s.opname.startswith("LOAD_") and isinstance(s.argval, str))
        self.texts |= {chain.names[-1].removesuffix(ANY) for chain in chains if chain.names[-1].endswith(ANY)}
        self._read_itself(function)
        self._read_texts(function)

    def _go_through(self, module: nn.Module, part: nn.Module | None, value: int, function: Function) -> None:
        """Note that some code takes what is in a sequence, or one part of it, and what is in that again."""
        self.opened.open(module, function.code, None if part is None else [part])
        if part is not None and holds(part) and not calls_whole(function.code, value + 2):
            self._go_through(part, None, value + 2, function)
        if part is None and not calls_wholes(function.code, value):
            for below in (below for child in module.children() for below in contained(child)):
                if holds(below):
                    self.opened.open(below, function.code)

    def _read_itself(self, function: Function) -> None:
        """Note what a method does with its own module as a value."""
        owners = self.paths.instances.get(function.owner, []) if function.owner else []
        values = values_of(function.code, function.owner_name) if owners else []
        fates = [fate_of(function.code, i, function.whole.__globals__, holds=holds(owners[0])) for i in values]
        if Fate.USED in fates:
            self.given.hand_on(function, owners)
        for module in filter(holds, owners):
            if values and "super" in function.code.co_names:  # which goes through it as well
                self.named.called.update(map(id, module.children()))
            for i, fate in zip(values, fates, strict=True):
                if fate is Fate.USED:
                    self._go_through(module, None, i, function)
        for module in owners if not function.forward and takes_own(function.code, function.owner_name) else ():
            if (id(module) in self.pairs or id(module) in self.backs) and not is_norm(module):  # whose methods go
                self._use(module)

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
            starts = self.paths.instances.get(function.owner, []) if function.owner else [self.model]
            self.named.called.update(id(below) for start in starts for below in start.modules())
        if looks_at_variables(function.code):
            for module, calls in self.called.items():
                if any(place.code is function.code for call in calls for place in call.places):
                    self.named.called.add(module)

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
            self.named.called |= modules if self.names[name] or self.loads[name] or is_dunder(name) else set()
        asked = {*self.pairs, *self.backs} - self.named.called
        for module, code, parts in self.given.taken(functions) if asked else ():
            self.opened.open(module, code, parts)
        self.named.called |= self.opened.reached(self.called)
        self.named.pairs |= self.opened.broken
        for layer, norms in self.pairs.items():
            for norm in norms:
                for call in self.called[layer]:
                    if comes_elsewhere(call, max(self.called[norm], key=partial(shared, call)), self.loads, self.texts):
                        self.named.pairs.add((layer, norm))
        if self.loose:
            for read in self.named.read.values():
                read.update(self.named.called)
