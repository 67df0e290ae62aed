"""Whether a call that some code writes is one that was seen in a run."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import CodeType

from torch import nn

from normfree.code.bytecode import index_of
from normfree.code.chains import Chain
from normfree.tracing.callers import Call, Place

__all__ = ["was_seen"]


def was_seen(
    calls: Sequence[Call] | None, module: nn.Module, code: CodeType, chain: Chain, chains: Sequence[Chain]
) -> bool:
    """Whether the call of a module that a chain ends in is one of those that were seen, or none matters.

    Args:
        calls: Those that were seen, or ``None`` if the module is not in question.
        module: The module.
        code: The code.
        chain: The chain.
        chains: All of the code.
    """
    for call in calls or ():
        for place, inner in zip(call.places, (*call.places[1:], None), strict=True):
            if place.code is code and _calls(call, inner, module):
                at = index_of(place)
                same = [c for c in chains if c.names[-1:] == chain.names[-1:] and chain.end < c.end <= at]
                if chain.end < at and not same:
                    return True
    return calls is None


def _calls(call: Call, inner: Place | None, module: nn.Module) -> bool:
    """Whether it is the call of a module that has brought a function where it stands, and ``inner`` to run."""
    forward = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    around = any(place.code is forward for place in call.places)  # else it is the layer itself
    return around == (inner is not None) and (inner is None or inner.code is forward)
