"""Which modules a chain of names may lead to: from its own module, or from any that has a part of such a name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torch import nn

from normfree.code.chains import Chain, is_of_file
from normfree.code.handing import Handed
from normfree.code.reach import Function
from normfree.code.words import leads_in

__all__ = ["Paths"]


class Paths:
    """The modules of a model by their classes, and by the names that others have for them."""

    def __init__(self, model: nn.Module) -> None:
        self.instances: dict[type, list[nn.Module]] = defaultdict(list)
        self._by_name: dict[str, list[nn.Module]] = defaultdict(list)
        for module in model.modules():
            for cls in type(module).__mro__:
                self.instances[cls].append(module)
            for name, child in module._modules.items():
                if child is not None:
                    self._by_name[name].append(child)

    def ends(self, chain: Chain, function: Function, given: Handed) -> Iterator[tuple[nn.Module, tuple[str, ...]]]:
        """Yield the modules that a chain of names may end at, each with the names that are left.

        Args:
            chain: The chain.
            function: Where it stands.
            given: Told of what is taken out of what is not known.
        """
        own, around = chain.base is not None and chain.base == function.owner_name, function.whole.__globals__
        home = self.instances.get(function.owner) if own and function.owner else None
        first = (
            1 if own and home is None else 0
        )  # what an object holds is known, and whose class is none of the model's
        known = next((i for i, n in enumerate(chain.names) if i >= first and n in self._by_name), None)
        inside = next((i for i, n in enumerate(chain.names) if i >= own and leads_in(n, unknown=True)), None)
        if known is None and inside is not None and not is_of_file(function.code, chain, around, chain.names[inside:]):
            given.take(function, chain, chain.names[inside:])
        if home is None and known is None:
            return
        starts = home or self._by_name[chain.names[known or 0]]
        names = chain.names if home else chain.names[(known or 0) + 1 :]
        for start in starts:
            module, rest = start, names
            while rest and module._modules.get(rest[0]) is not None:
                module, rest = module._modules[rest[0]], rest[1:]  # type: ignore[assignment]  # it is no None
            if rest != chain.names or (rest[:1] and leads_in(rest[0])):
                yield module, rest
