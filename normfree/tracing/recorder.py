"""One run of a model, written down as a torch.fx graph: which layer and which function made which tensor of which.

Values are real tensors, so a forward may ask them whatever it likes: shapes, types, loops and dictionaries are simply
what they are.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normfree.rewriting.changing import set_class
from normfree.tracing.notes import Notes, tensors_in
from normfree.tracing.shapes import meta_function, on_meta, shortened

__all__ = ["Recorder", "is_default", "optional_arguments"]

_Args = tuple[Any, ...]
_Kwargs = dict[str, Any]
_Forward = Callable[..., Any]


class Recorder(Notes, TorchFunctionMode):
    """Writes down what happens between the modules of a model, which are leaves or looked into.

    Every module gets a ``forward`` of its own, which the caller takes away. ``entered`` is called when the forward of a
    module begins that is looked into. On the meta device no tensor may be made elsewhere.
    """

    values_count = False
    """Whether somebody looks at the values of a run, and not only at what it does."""

    def __init__(
        self,
        model: nn.Module,
        leaves: Mapping[str, bool],
        sites: frozenset[str],
        classes: Mapping[int, type[nn.Module]],
        entered: Callable[[], None],
        meta: bool,
    ) -> None:
        Notes.__init__(self, model)
        TorchFunctionMode.__init__(self)  # type: ignore[no-untyped-call]  # torch's own
        self._classes, self._entered, self._meta, self._sites = classes, entered, meta, sites
        self._inside = False  # of a leaf: what happens there is not written down
        for name, module in model.named_modules():
            self._wrap(module, name, leaf=bool(name) and (leaves[name] or name in sites), norm=name in sites)

    def __deepcopy__(self, _: Any) -> Recorder:
        """Stay the one that writes down what copies of its modules do."""
        return self

    def __torch_function__(self, func: Any, types: Any, args: _Args = (), kwargs: _Kwargs | None = None) -> Any:
        """Run one function of torch, and write it down if it makes or changes a tensor."""
        kwargs = kwargs or {}
        if self._meta:
            args, kwargs = on_meta(func, args, kwargs)
        if self._inside:
            out = func(*args, **kwargs)
            self.leaked += tensors_in(out)
            return out
        if func is Tensor.__iter__:
            return iter(self.__torch_function__(Tensor.unbind, types, args))
        product = _PRODUCTS.get(str(getattr(func, "__name__", "")).rstrip("_"))
        if product is not None and len(args) == 3 and not kwargs.keys() - {"value", "alpha"}:
            added = self.__torch_function__(product, types, args[1:])
            add = Tensor.add_ if func.__name__.endswith("_") else torch.add
            return self.__torch_function__(add, types, (args[0], added), {"alpha": next(iter(kwargs.values()), 1)})
        self.next_step()
        before = [(tensor, tensor._version) for tensor in tensors_in((args, kwargs))]
        out = (meta_function(func) if self._meta else func)(*args, **kwargs)
        makes = isinstance(out, Tensor) or any(True for _ in tensors_in(out))
        if not makes and all(tensor._version == version for tensor, version in before):
            return out
        return self.write_down(*_operation(func, self.argument(args), self.argument(kwargs)), before, out)

    def _wrap(self, module: nn.Module, path: str, leaf: bool, norm: bool) -> None:
        answers, real = type(module), self._classes.get(id(module), type(module))
        set_class(module, real)
        forward = module.forward
        set_class(module, answers)
        call = self._leaf if leaf else self._composite
        shorten = not self._meta and not self.values_count
        short = shortened(module, real, forward, norm, self._meta) if leaf and (self._meta or shorten) else forward

        @functools.wraps(forward)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return forward(*args, **kwargs)
            alone = len(args) == 1 and not kwargs
            return call(module, path, short if alone else forward, args, kwargs)

        module.__dict__["forward"] = recorded
        for name in ("_parameters", "_buffers") if norm else ():
            module.__dict__[name] = _Watched(module.__dict__[name], functools.partial(self._note, path))

    def _note(self, path: str, name: str) -> None:
        if not self._inside:
            self.seen.read.setdefault(path, f"{path}.{name}")

    def _composite(self, module: nn.Module, path: str, forward: _Forward, args: _Args, kwargs: _Kwargs) -> Any:
        """Run a module that is looked into."""
        if path:
            self.seen.calls[path] += 1
            if not is_default_call(module, args, kwargs):
                self.seen.optional.add(path)
        self._entered()
        self.stack.append(path)
        try:
            out = forward(*args, **kwargs)
        finally:
            self.stack.pop()
        if isinstance(out, Tensor) and path:
            with torch._C.DisableTorchFunction():
                node = self.node_of(out)
            if node is not None:
                self.seen.exits[node] = (*self.seen.exits.get(node, ()), path)
        return out

    def _leaf(self, module: nn.Module, path: str, forward: _Forward, args: _Args, kwargs: _Kwargs) -> Any:
        """Run a module that is one operation, as what it really is."""
        self.seen.calls[path] += 1
        self.next_step()
        if isinstance(module, _FOLDED) or path in self._sites:
            self.seen.called[path] = tuple(self.stack)
        with torch._C.DisableTorchFunction():
            node_args, node_kwargs = self.argument(args), self.argument(kwargs)
            before = [(tensor, tensor._version) for tensor in tensors_in((args, kwargs))]
        answers = type(module)
        self._inside, self.leaked = True, []
        try:
            set_class(module, self._classes.get(id(module), answers))
            out = forward(*args, **kwargs)
        finally:
            set_class(module, answers)
            self._inside = False
        with torch._C.DisableTorchFunction():
            return self.write_down("call_module", path, node_args, node_kwargs, before, out)


class _Watched(dict[str, Any]):
    """The tensors of a norm; says which of them somebody takes."""

    def __init__(self, tensors: Mapping[str, Any], taken: Callable[[str], None]) -> None:
        super().__init__(tensors)
        self.taken = taken

    def __getitem__(self, name: str) -> Any:
        self.taken(name)
        return super().__getitem__(name)


def _operation(func: Any, args: Any, kwargs: Any) -> tuple[str, Any, Any, Any]:
    """Return what a node says of a call of one of torch's functions, methods, operators or attributes."""
    name = str(getattr(func, "__name__", ""))
    if "other" in kwargs and len(args) == 1:
        args, kwargs = (*args, kwargs["other"]), {key: value for key, value in kwargs.items() if key != "other"}
    if name == "__get__":
        return "call_function", getattr, (args[0], str(getattr(func.__self__, "__name__", ""))), {}
    plain = name.strip("_")
    if name.startswith("__") and hasattr(operator, plain):
        return "call_function", getattr(operator, plain), args, kwargs
    if name.startswith("__r") and plain[1:] in _REFLECTED:
        return "call_function", _REFLECTED[plain[1:]], args[::-1], kwargs
    if name == "rsub":
        return "call_function", torch.sub, args[::-1], kwargs
    if str(getattr(func, "__qualname__", "")).startswith(("Tensor.", "TensorBase.", "_TensorBase.")):
        return "call_method", name, args, kwargs
    return "call_function", func, args, kwargs


_REFLECTED = {name: getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "matmul", "pow")}
_FOLDED = (nn.modules.conv._ConvNd, nn.Linear)
_REFLECTED["div"] = operator.truediv
_PRODUCTS = {"addcmul": torch.mul, "addcdiv": torch.div, "addmm": torch.mm, "baddbmm": torch.bmm}
"""What adds a product to something: two operations in one."""


def is_default_call(module: nn.Module, args: _Args, kwargs: _Kwargs) -> bool:
    """Whether a call gives an optional argument nothing but its default."""
    if len(args) + len(kwargs) <= 1 and not kwargs:
        return True  # most calls; the first argument is hardly ever optional
    given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    return all(is_default(given.get(name, default), default) for name, default in optional_arguments(module).items())


def optional_arguments(module: nn.Module) -> dict[str, Any]:
    """Return the optional arguments of a module's forward with their defaults."""
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def is_default(value: Any, default: Any) -> bool:
    """Whether a value is the default, or a number or text that is equal to it."""
    return value is default or (type(value) is type(default) and type(value) in _PLAIN and value == default)


_PLAIN = (int, float, bool, str)  # a tuple: torch 2.8 compiles no question to a set of classes
