"""Watching a model run: which operators see which tensors, with randomness off."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["NormSpy", "Recorder", "Still", "Watched", "module_stack", "out_of_place", "tensors"]


def tensors(value: object) -> list[Tensor]:
    """Return the tensors in any nesting of lists, dicts, tuples and plain objects, in order."""
    found: list[Tensor] = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif not isinstance(leaf, (nn.Module, type)) and getattr(leaf, "__dict__", None):
            found.extend(tensors(list(vars(leaf).values())))
    return found


# Half: `rand() < keep` and `floor(keep + rand())` both keep, for every keep above a half.
_DRAWS = {"aten::bernoulli": 1.0, "aten::bernoulli_": 1.0, "aten::rand": 0.5, "aten::rand_like": 0.5}
_DRAWS |= {"aten::uniform_": 0.5, "aten::randn": 0.0, "aten::randn_like": 0.0, "aten::normal_": 0.0}


class Still(TorchDispatchMode):
    """Dropout, stochastic depth and noise stand still, in whatever form they are written: every draw is the same."""

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


class NormSpy(TorchDispatchMode):
    """Records every batch-norm operator that normalises an activation over the batch.

    A tensor is an activation if it was computed from an input. Weight standardisation normalises what was computed
    from parameters alone, and instance norm runs as a batch norm over a batch of one: neither mixes samples.
    """

    def __init__(self, inputs: list[Tensor], stack: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.activations = {_storage(x) for x in inputs}
        self.stack = stack
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        touched = any(_storage(x) in self.activations for x in tensors((args, kwargs)))
        name = func._schema.name
        if touched and "batch_norm" in name and "backward" not in name and args[0].shape[0] != 1:
            self.seen.append(self.stack[-1])
        result = func(*args, **kwargs)
        for x in tensors(result):
            # Memory is used again: what a storage holds is decided anew by whoever writes it.
            (self.activations.add if touched else self.activations.discard)(_storage(x))
        return result


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


@contextlib.contextmanager
def module_stack(model: nn.Module) -> Iterator[list[str]]:
    """Yield the names of the modules whose forward is running, innermost last."""
    stack = ["the root"]
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name or "the root")))
        handles.append(module.register_forward_hook(lambda *_: stack.pop() and None, always_call=True))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def out_of_place(model: nn.Module) -> Iterator[None]:
    """Switch every in-place module to out-of-place."""
    changed = [module for module in model.modules() if getattr(module, "inplace", False) is True]
    try:
        for module in changed:
            module.inplace = False  # type: ignore[assignment]  # a plain bool attribute
        yield
    finally:
        for module in changed:
            module.inplace = True  # type: ignore[assignment]  # as it was


@dataclass(frozen=True)
class Watched:
    """What to look at when one addition runs, for the sum that it belongs to.

    Attributes:
        addition: The addition.
        name: The sum. ``a + b + c`` is one, of two additions.
        branches: The branches that this addition adds.
        intact: What must still hold the values it was computed with: the skip path and where it starts, where this
            addition adds that.
    """

    addition: fx.Node
    name: str
    branches: tuple[fx.Node, ...]
    intact: tuple[fx.Node, ...]


class Recorder(fx.Interpreter):
    """Runs a graph and looks at the operands of chosen additions at the moment they are added.

    Not later: ``y += x; z + y`` writes over a branch once it has been added, and no harm is done.

    Args:
        module: The module the graph was traced from.
        graph: Its graph.
        watched: What to look at.

    Attributes:
        zero_branches: For each sum, how many of its branches were zero.
        written: Sums of which a skip path had been written into.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph, watched: Iterable[Watched]) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.watched: dict[fx.Node, list[Watched]] = {}
        for watch in watched:
            self.watched.setdefault(watch.addition, []).append(watch)
        self.kept_nodes = {node for found in self.watched.values() for watch in found for node in watch.intact}
        self.copies: dict[fx.Node, Tensor] = {}
        self.zero_branches: Counter[str] = Counter()
        self.written: list[str] = []

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, after looking at its operands if it is watched."""
        for watch in self.watched.get(n, ()):
            self.zero_branches[watch.name] += sum(not torch.any(self.env[branch]) for branch in watch.branches)
            kept = [node for node in watch.intact if node in self.copies]
            if not all(torch.equal(self.env[node], self.copies[node]) for node in kept):
                self.written.append(watch.name)
        result = super().run_node(n)
        if n in self.kept_nodes and isinstance(result, Tensor):
            self.copies[n] = result.detach().clone()
        return result
