"""Randomness stands still: dropout, stochastic depth and noise, in whatever form they are written."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Still", "in_mode", "random_halves", "with_memory"]

# Half: `rand() < keep` and `floor(keep + rand())` both keep, for every keep above a half.
_DRAWS = {"aten::bernoulli": 1.0, "aten::bernoulli_": 1.0, "aten::rand": 0.5, "aten::rand_like": 0.5}
_DRAWS |= {"aten::uniform_": 0.5, "aten::randn": 0.0, "aten::randn_like": 0.0, "aten::normal_": 0.0}


class Still(TorchDispatchMode):
    """Every draw of torch's is the same."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name == "aten::native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if name == "aten::rrelu_with_noise":
            return torch.ops.aten.leaky_relu(args[0], (args[2] + args[3]) / 2)
        result = func(*args, **kwargs)
        return result.fill_(_DRAWS[name]) if name in _DRAWS else result


def with_memory() -> contextlib.AbstractContextManager[Any]:
    """Make tensors with memory again where the user has asked for such without: what is computed here is numbers."""
    return torch.device("cpu") if torch.get_default_device().type == "meta" else contextlib.nullcontext()


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put every module in one mode, and back into its own afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.train(training)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def random_halves() -> Iterator[Callable[[], None]]:
    """Yield what makes the next 300 draws of Python's and NumPy's generators one half; they go on as before behind it.

    Stochastic depth written with them would hide a block from a run, or from one of two.
    """
    numpy = sys.modules.get("numpy")
    states: list[tuple[Callable[[Any], None], Any, Any]]
    states = [(random.setstate, random.getstate(), (3, (_WORD,) * 624 + (0,), None))]
    if numpy is not None:
        halves = "MT19937", numpy.full(624, _WORD, numpy.uint32), 0
        states.append((numpy.random.set_state, numpy.random.get_state(), halves))

    def reset() -> None:
        for set_state, _, halves in states:
            set_state(halves)

    try:
        yield reset
    finally:
        for set_state, before, _ in states:
            set_state(before)


_WORD = 0x80102204
"""A word of a Mersenne Twister's state of which it makes ``1 << 31``: half of the way."""
