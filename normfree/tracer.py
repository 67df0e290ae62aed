"""A torch.fx tracer that also records who owns a node, who returns it, and where tracing failed."""

from __future__ import annotations

import dis
import inspect
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import fx, nn

from normfree.layers import ChannelAffine, ScaledWeight, SkipInit
from normfree.norms import is_norm
from normfree.roles import Role, elementwise, module_role

__all__ = ["Tracer", "calls_batch_norm", "is_layer", "untraceable_functions"]


class _Unpacked(fx.Proxy):
    """``a, b = proxy`` asks the one instruction that unpacks for its count.

    torch.fx disassembles the whole function for it, which is half of the time that tracing an attention layer takes.
    """

    def __iter__(self) -> Iterator[fx.Proxy]:
        frame = inspect.currentframe()
        caller = None if frame is None else frame.f_back
        if caller is not None:
            code, at = caller.f_code.co_code, caller.f_lasti
            if code[at] == dis.opmap["UNPACK_SEQUENCE"]:
                return (operator.getitem(cast(Any, self), i) for i in range(code[at + 1]))
        return iter(self.tracer.iter(self))


class _Attribute(_Unpacked, fx.proxy.Attribute):
    """``x.shape``, which may be unpacked too."""


class _Proxy(_Unpacked):
    """Also records what ``x += y`` does: torch.fx itself would write it down as ``x = x + y``."""

    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class Tracer(fx.Tracer):
    """Records, besides the graph, who owns each node, who returns it, and the module in which tracing failed."""

    def __init__(
        self,
        sites: frozenset[str] = frozenset(),
        opaque: set[type[nn.Module]] | None = None,
        layers: dict[int, bool] | None = None,
        functions: tuple[Callable[..., Any], ...] = (),
    ) -> None:
        super().__init__(autowrap_functions=functions)
        self.sites = sites
        self.opaque = opaque or set()
        self.stack: list[str] = [""]
        self.owners: dict[fx.Node, str] = {}
        self.exits: dict[fx.Node, list[str]] = {}
        self.calls: dict[str, int] = {}
        self.failed: str | None = None
        self.layers = layers or {}
        self.asked: set[str] = set()
        self.read: dict[str, str] = {}
        self._held: dict[int, str] = {}
        self._names: dict[int, str] | None = None

    def look(self, root: nn.Module, mode: str, constants: dict[str, Any]) -> fx.Graph:
        """Trace ``root`` in a mode and leave its modules as they were, whatever their forwards keep or count.

        Their own ``training`` flags are out of the way meanwhile, so that reading one is seen.
        """
        opened = [m for m in root.modules() if not self.layers[id(m)]]
        norms = {name: m for name, m in root.named_modules() if name in self.sites}
        self._held = {id(t): name for name, m in norms.items() for t in (*m.parameters(), *m.buffers())}
        kept = [(m.__dict__, dict(m.__dict__), _containers(m)) for m in opened]
        for module in opened:
            del module.__dict__["training"]
            module._buffers["training"] = mode == "train"  # type: ignore[assignment]  # where __getattr__ looks
        try:
            return self.trace(root, constants)
        finally:
            for now, before, containers in kept:
                # Constants of the graph are put on the root by torch.fx, and the graph refers to them.
                constants_of_graph = {k: v for k, v in now.items() if k.startswith("_tensor_constant")}
                now.clear()
                now.update(before | constants_of_graph)
                for container, content in containers:
                    container.clear()
                    (container.extend if isinstance(container, list) else container.update)(content)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Return a proxy for a parameter, looked up by identity, and note who asks for the mode."""
        if attr == "training":
            self.asked.add(self.stack[-1])
        if id(attr_val) in self._held:
            self.read.setdefault(self._held[id(attr_val)], f"{self._held[id(attr_val)]}.{attr}")
        if not isinstance(attr_val, nn.Parameter):
            return attr_val
        if self._names is None:
            self._names = {id(p): name for name, p in reversed(list(self.root.named_parameters()))}
        name = self._names.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        """Return what a node stores for an argument; the commonest kinds need none of torch.fx's searches."""
        kind = type(a)
        if kind is _Proxy:
            return a.node
        if kind in _CONSTANTS:
            return a
        if kind is tuple:
            return tuple(self.create_arg(item) for item in a)
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Stop at norms, at layers, and at what was found untraceable."""
        return module_qualified_name in self.sites or type(m) in self.opaque or self.layers[id(m)]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return a proxy that knows in-place arithmetic."""
        return _Proxy(node, self)

    def create_node(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any | None = None,
    ) -> fx.Node:
        """Remember whose forward creates the node, instead of torch.fx's own records, which cost more than the node."""
        node = self.graph.create_node(kind, target, args, kwargs, name, type_expr)
        self.owners[node] = self.stack[-1]
        return node

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Count the call, and remember what the module returns or that it failed.

        A module that a forward makes for itself, such as ``nn.Sequential(self.a, self.b)``, has no path: what it does
        belongs to whose forward that is.
        """
        if id(m) not in self.layers:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        self.calls[path] = self.calls.get(path, 0) + 1
        if self.is_leaf_module(m, path):
            return self.create_proxy("call_module", path, args, kwargs)
        self.stack.append(path)
        try:
            result = forward(*args, **kwargs)
        except Exception:
            self.failed = path if self.failed is None else self.failed
            raise
        finally:
            self.stack.pop()
        if isinstance(result, fx.Proxy):
            self.exits.setdefault(result.node, []).append(path)
        return result


_CONSTANTS = {int, float, bool, str, type(None)}


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    """Return what a module keeps in dicts, lists and sets, each with a copy: a proxy cached there must not stay."""
    held = (value for name, value in module.__dict__.items() if not name.endswith("_hooks"))
    return [(value, value.copy()) for value in held if type(value) in (dict, OrderedDict, list, set)]


def is_layer(module: nn.Module) -> bool:
    """Whether nothing that the analysis asks about lies inside: a layer or an activation, but no composite.

    To be asked before a trace and not during one, when calling anything would be recorded.
    """
    if is_norm(module) or isinstance(module, (SkipInit, ChannelAffine, ScaledWeight, torch.jit.ScriptModule)):
        return True
    if isinstance(module, nn.Sequential) or calls_batch_norm(module):
        return False
    if type(module).__module__.startswith("torch.nn"):
        return True
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
        return not any(is_norm(m) for m in module.children())
    if any(True for _ in module.children()):
        # Without a norm only what may be a projection, a gate or a tail is worth a look: attention is not.
        return not any(map(_is_of_interest, module.modules()))
    return module_role(module) is not Role.OTHER or elementwise(module) is not None


def _is_of_interest(module: nn.Module) -> bool:
    """Whether a module makes a composite worth a look: a norm of any form, or what a skip path or a tail may be."""
    if is_norm(module) or isinstance(module, nn.modules.conv._ConvNd) or calls_batch_norm(module):
        return True
    return module_role(module) in (Role.POOL, Role.PAD, Role.UPSAMPLE)


def calls_batch_norm(module: nn.Module) -> bool:
    """Whether the module's own forward names ``batch_norm``: then its graph shows what is normalised."""
    if is_norm(module):
        return False
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and any("batch_norm" in name and not hasattr(module, name) for name in code.co_names)


def untraceable_functions(model: nn.Module) -> tuple[Callable[..., Any], ...]:
    """Return the functions that branch on shapes, which timm marks, if there is anything of timm's in the model."""
    if not any(type(module).__module__.startswith("timm.") for module in model.modules()):
        return ()
    marked = getattr(sys.modules.get("timm.layers"), "get_notrace_functions", None)
    return tuple(marked()) if marked is not None else ()
