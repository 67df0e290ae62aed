"""One run of a model, written down as a torch.fx graph: which layer and which function made which tensor of which.

Values are real tensors, so a forward may ask them whatever it likes: shapes, types, loops and dictionaries are simply
what they are. Writing into a tensor, or into a view of it, is an edge as well.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from normfree.tracing.calls import is_default_call
from normfree.tracing.traces import Graph, Value

__all__ = ["Recorder", "overwritten"]


def overwritten(_: Any, part: Any) -> Any:
    """Stand in a graph for a tensor into a part of which somebody has written through a view."""
    return part


class Recorder(TorchFunctionMode):
    """Writes down what happens between the modules of a model, which are leaves or looked into.

    Args:
        model: The model. Every module of it gets a ``forward`` of its own, which the caller takes away again.
        leaves: Whether a module is one operation, by the identity of every module.
        sites: Names of the norms, or of what has taken their place.
        classes: What modules really are that answer to another class meanwhile, by identity.
        entered: Is told when the forward of a module begins that is looked into.
        meta: Whether the tensors are on the meta device: then no tensor may be made elsewhere.

    Attributes:
        graph: What was written down so far.
    """

    def __init__(
        self,
        model: nn.Module,
        leaves: Mapping[int, bool],
        sites: frozenset[str],
        classes: Mapping[int, type[nn.Module]],
        entered: Callable[[], None],
        meta: bool,
    ) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self._owners: dict[fx.Node, str] = {}
        self._exits: dict[fx.Node, tuple[str, ...]] = {}
        self._values: dict[fx.Node, Value] = {}
        self._called: list[str] = []
        self._optional: set[str] = set()
        self._read: dict[str, str] = {}
        self._stack = [""]
        self._inside = False  # of a leaf: what happens there is not written down
        self._kept: list[Any] = []  # nothing that was seen may die: its identity would be given to another
        self._nodes: dict[int, fx.Node] = {}
        self._parts: dict[int, tuple[fx.Node, tuple[Any, ...]]] = {}
        self._writes: dict[int, fx.Node] = {}
        self._order: dict[fx.Node, int] = {}
        self._steps: dict[fx.Node, int] = {}
        self._step = 0
        self._classes, self._entered = classes, entered
        self._meta = meta
        self._running = False
        self._parameters = {id(p): name for name, p in reversed(list(model.named_parameters()))}
        for name, module in model.named_modules():
            self._wrap(module, name, leaf=bool(name) and (leaves[id(module)] or name in sites), norm=name in sites)

    def give(self, name: str, tensor: Tensor) -> None:
        """Write down an argument of the model."""
        self._bind(tensor, self._create("placeholder", name, (), {}))

    def __enter__(self) -> Recorder:
        self._running = True
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._running = False
        super().__exit__(*error)

    def finish(self, returned: list[Tensor]) -> Graph:
        """Return the graph of a run that has come to its end."""
        nodes = (self._node_of(tensor) for tensor in returned)
        self._create("output", "output", (tuple(node for node in nodes if node is not None),), {})
        return Graph(
            self.graph,
            self._owners,
            self._exits,
            Counter(self._called),
            self._read,
            frozenset(self._optional),
            self._values,
            self._order,
            self._steps,
        )

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one function of torch, and write it down if it makes or changes a tensor."""
        kwargs = kwargs or {}
        if self._meta:
            args, kwargs = _on_meta(func, args, kwargs)
        if self._inside:
            return func(*args, **kwargs)
        if func is Tensor.__iter__:
            return iter(self.__torch_function__(Tensor.unbind, types, args))
        self._next_step()
        before = [(tensor, tensor._version) for tensor in _tensors((args, kwargs))]
        out = func(*args, **kwargs)
        makes = isinstance(out, Tensor) or any(True for _ in _tensors(out))
        if not makes and all(tensor._version == version for tensor, version in before):
            return out
        return self._write_down(*_operation(func, self._argument(args), self._argument(kwargs)), before, out)

    def _write_down(
        self, op: str, target: Any, args: Any, kwargs: Any, before: list[tuple[Tensor, int]], out: Any
    ) -> Any:
        """Create the node of an operation that has run, with what it returned and what it wrote into."""
        node = self._create(op, target, args, kwargs)
        changed = [tensor for tensor, version in before if tensor._version != version]
        out = self._renewed(out, {id(tensor) for tensor, _ in before} - {id(tensor) for tensor in changed}, node)
        for tensor in changed:
            self._nodes[id(tensor)] = self._writes[_storage(tensor)] = node
            self._value(node, tensor, writes=True)
        self._bind(out, node)
        return out

    def _renewed(self, out: Any, given: set[int], node: fx.Node) -> Any:
        """Return another name for a tensor that is handed on as it came: what reads it now reads this operation."""
        if isinstance(out, Tensor) and id(out) in given:
            out = out.detach()
            self._value(node, out, handed_on=True)
            return out
        if type(out) in (tuple, list):
            return type(out)(item.detach() if id(item) in given else item for item in out)
        return out

    def _create(self, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs)
        self._owners[node], self._order[node], self._steps[node] = self._stack[-1], len(self._order), self._step
        return node

    def _value(self, node: fx.Node, tensor: Tensor, *, writes: bool = False, handed_on: bool = False) -> None:
        """Note what a node returned, the first time that it is known."""
        if node not in self._values:
            self._values[node] = Value.of(tensor, writes=writes, handed_on=handed_on)

    def _next_step(self) -> None:
        """Count an operation that is about to run."""
        self._step += 1

    def _bind(self, out: Any, node: fx.Node, path: tuple[Any, ...] = ()) -> None:
        """Remember what made each tensor in a result; what takes it out of a tuple is written down once it is used."""
        if isinstance(out, Tensor):
            self._kept.append(out)
            if path:
                self._parts[id(out)] = node, path
                self._nodes.pop(id(out), None)
            else:
                self._nodes[id(out)] = node
                self._value(node, out)
        elif isinstance(out, (tuple, list)):
            for i, item in enumerate(out):
                self._bind(item, node, (*path, i))
        elif isinstance(out, Mapping):
            for key, item in out.items():
                self._bind(item, node, (*path, key))
        elif hasattr(out, "__dict__") and not isinstance(out, (nn.Module, type)):
            for key, item in vars(out).items():
                self._bind(item, node, (*path, key))

    def _node_of(self, tensor: Tensor) -> fx.Node | None:
        """Return what made a tensor as it is now, or ``None`` for a constant."""
        node = self._nodes.get(id(tensor))
        if node is None and id(tensor) in self._parts:
            node, path = self._parts[id(tensor)]
            for key in path:
                node = self._create("call_function", operator.getitem, (node, key), {})
            self._value(node, tensor)
            self._nodes[id(tensor)] = node
        if node is None and id(tensor) in self._parameters:
            node = self._nodes[id(tensor)] = self._create("get_attr", self._parameters[id(tensor)], (), {})
            self._kept.append(tensor)
        last = self._writes.get(_storage(tensor)) if self._writes else None
        if last is None or node is last or (node is not None and self._order[node] > self._order[last]):
            return node
        if not self._values[last].covers(Value.of(tensor)):
            last = self._create("call_function", overwritten, (node, last), {})
            self._value(last, tensor)
        self._nodes[id(tensor)] = last
        self._kept.append(tensor)
        return last

    def _argument(self, value: Any) -> Any:
        """Return what a node stores for an argument."""
        if isinstance(value, Tensor):
            node = self._node_of(value)
            return "constant" if node is None else node
        if value is None or type(value) in _ATOMS:
            return value
        if isinstance(value, (tuple, list)):
            return tuple(map(self._argument, value)) if type(value) is not list else list(map(self._argument, value))
        if isinstance(value, Mapping):
            return {str(key): self._argument(item) for key, item in value.items()}
        if isinstance(value, slice):
            return slice(*map(self._argument, (value.start, value.stop, value.step)))
        own = hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type))
        held = [self._argument(item) for item in vars(value).values()] if own else []
        found = [item for item in held if isinstance(item, fx.Node)]
        return tuple(found) if found else type(value).__name__

    def _wrap(self, module: nn.Module, path: str, leaf: bool, norm: bool) -> None:
        answers, real = type(module), self._classes.get(id(module), type(module))
        module.__class__ = real
        forward = module.forward
        module.__class__ = answers
        call = self._leaf if leaf else self._composite
        alike = self._meta and (norm or real in _ACTIVATIONS)
        in_place = getattr(module, "inplace", False) is True and not norm

        @functools.wraps(forward)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if self._inside or not self._running:
                return forward(*args, **kwargs)
            short = alike and len(args) == 1 and not kwargs
            return call(module, path, functools.partial(_like, in_place=in_place) if short else forward, args, kwargs)

        module.__dict__["forward"] = recorded
        for name in ("_parameters", "_buffers") if norm else ():
            module.__dict__[name] = _Watched(module.__dict__[name], functools.partial(self._note, path))

    def _note(self, path: str, name: str) -> None:
        if self._running and not self._inside:
            self._read.setdefault(path, f"{path}.{name}")

    def _composite(
        self, module: nn.Module, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a module that is looked into."""
        if path:
            self._called.append(path)
            if not is_default_call(module, args, kwargs):
                self._optional.add(path)
        self._entered()
        self._stack.append(path)
        try:
            out = forward(*args, **kwargs)
        finally:
            self._stack.pop()
        if isinstance(out, Tensor) and path:
            with torch._C.DisableTorchFunction():
                node = self._node_of(out)
            if node is not None:
                self._exits[node] = (*self._exits.get(node, ()), path)
        return out

    def _leaf(
        self, module: nn.Module, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a module that is one operation, as what it really is."""
        self._called.append(path)
        self._next_step()
        with torch._C.DisableTorchFunction():
            node_args, node_kwargs = self._argument(args), self._argument(kwargs)
            before = [(tensor, tensor._version) for tensor in _tensors((args, kwargs))]
        answers = type(module)
        self._inside = True
        try:
            module.__class__ = self._classes.get(id(module), answers)
            out = forward(*args, **kwargs)
        finally:
            module.__class__ = answers
            self._inside = False
        with torch._C.DisableTorchFunction():
            return self._write_down("call_module", path, node_args, node_kwargs, before, out)


class _Watched(dict[str, Any]):
    """The tensors of a norm; says which of them somebody takes."""

    def __init__(self, tensors: Mapping[str, Any], taken: Callable[[str], None]) -> None:
        super().__init__(tensors)
        self.taken = taken

    def __getitem__(self, name: str) -> Any:
        self.taken(name)
        return super().__getitem__(name)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in a result or in arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)


def _like(x: Tensor, *, in_place: bool) -> Tensor:
    """Return what a norm or an activation returns, as far as shapes go: torch computes those of an activation slowly."""
    with torch._C.DisableTorchFunction():
        if in_place:
            torch.autograd.graph.increment_version(x)
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _on_meta(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call that asks for another device than the one without memory."""
    if kwargs.get("device") is not None:
        kwargs = kwargs | {"device": "meta"}
    name = getattr(func, "__name__", "")
    if name == "to":
        args = (args[0], *("meta" if isinstance(a, (str, torch.device)) else a for a in args[1:]))
    elif name in ("cpu", "cuda"):
        args, kwargs = args[:1], {}
    return args, kwargs


def _operation(func: Any, args: Any, kwargs: Any) -> tuple[str, Any, Any, Any]:
    """Return what a node says of a call of one of torch's functions, methods, operators or attributes."""
    name = str(getattr(func, "__name__", ""))
    if name == "__get__":
        return "call_function", getattr, (args[0], str(getattr(func.__self__, "__name__", ""))), {}
    plain = name.strip("_")
    if name.startswith("__") and hasattr(operator, plain):
        return "call_function", getattr(operator, plain), args, kwargs
    if name.startswith("__r") and plain[1:] in _REFLECTED:
        return "call_function", _REFLECTED[plain[1:]], args[::-1], kwargs
    if str(getattr(func, "__qualname__", "")).startswith(("Tensor.", "TensorBase.", "_TensorBase.")):
        return "call_method", name, args, kwargs
    return "call_function", func, args, kwargs


_REFLECTED = {name: getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "matmul", "pow")}
_REFLECTED["div"] = operator.truediv
_ACTIVATIONS = {nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU}
_ATOMS = {int, float, bool, str, torch.dtype, torch.device, type(Ellipsis)}
