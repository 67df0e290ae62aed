"""Which layers are reached because code goes through what holds them, and does not say which it takes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise
from types import CodeType

from torch import nn

from normfree.code.chains import Chain
from normfree.code.reach import Function
from normfree.code.stepping import Loop, loop_over
from normfree.code.using import is_sequence
from normfree.tracing.callers import Call

__all__ = ["Opened"]


class Opened:
    """What was opened by which code.

    Attributes:
        mentioned: How often some code names a module, by the identity of that.
        changed: The attributes that some code does more to than read them.
        broken: Pairs of which a loop may call one without the other.
    """

    def __init__(self, pairs: Mapping[int, frozenset[int]], backs: Mapping[int, set[int]]) -> None:
        self.mentioned: Counter[tuple[int, CodeType]] = Counter()
        self.changed: set[str] = set()
        self.broken: set[tuple[int, int]] = set()
        self._pairs, self._backs = pairs, backs
        self._opened: Counter[tuple[int, CodeType]] = Counter()
        self._holders: dict[int, nn.Module] = {}
        self._parts: dict[tuple[int, CodeType], set[int]] = defaultdict(set)  # which of what they hold is taken
        self._loops: dict[tuple[int, CodeType], Loop | None] = {}

    def open(self, module: nn.Module, code: CodeType, parts: Iterable[nn.Module | None] | None = None) -> None:
        """Note that some code takes what a module holds, or only some parts of it."""
        self._opened[id(module), code] += 1
        self._holders[id(module)] = module
        self._parts[id(module), code] |= {id(m) for m in (module._modules.values() if parts is None else parts)}

    def go_through(self, module: nn.Module, chain: Chain, function: Function, owners: Iterable[nn.Module]) -> None:
        """Note how a method goes through a sequence of its module, if no other holds that.

        Args:
            module: The sequence.
            chain: How it is named.
            function: The method.
            owners: Modules whose method it is.
        """
        name = chain.names[0]
        own = chain.base == function.owner_name and len(chain.names) == 1 and is_sequence(module)
        mine = [owner for owner in owners if own and owner._modules.get(name) is module]
        self._loops[id(module), function.code] = loop_over(function, name, mine[0]) if len(mine) == 1 else None

    def reached(self, called: Mapping[int, tuple[Call, ...]]) -> set[int]:
        """Return the identities of what is held there, but for where only that led to the calls that were seen."""
        found = set[int]()
        for (holder, code), count in self._opened.items():
            parts, mentioned = self._parts[holder, code], self.mentioned[holder, code]
            held = {id(child) for child in self._holders[holder]._modules.values()} - self._together(holder, code)
            for child in held:
                seen = (place.code for call in called.get(child, ()) for place in call.places)
                mentions = max(count, mentioned) + self.mentioned[child, code]
                if (child in parts or count != mentioned) and (mentions > 1 or code not in seen):
                    found.add(child)
        return found

    def _together(self, holder: int, code: CodeType) -> set[int]:
        """Return the layers and norms of a sequence that a loop calls one after the other, keeping nothing between."""
        loop, held = self._loops.get((holder, code)), [id(m) for m in self._holders[holder]._modules.values()]
        if loop is None or loop.mentions != self._opened[holder, code] or len(set(held)) < len(held):
            return set()
        if not self.changed.isdisjoint(loop.told_by):
            return set()
        pairs, backs = self._pairs, self._backs
        behind = {a: b for k, (a, b) in enumerate(pairwise(held)) if k not in loop.seen and b in pairs.get(a, ())}
        before = {b: a for a, b in behind.items()}
        either = {*behind, *before}
        self.broken |= {(m, other) for m in either for other in pairs.get(m, ()) if other != behind.get(m)}
        self.broken |= {(other, m) for m in either for other in backs.get(m, ()) if other != before.get(m)}
        return either
