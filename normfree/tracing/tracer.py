"""A torch.fx tracer that also records who owns a node, who returns it, and what it could not look into."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import fx, nn

from normfree.errors import one_line
from normfree.tracing.asking import answering, names_in
from normfree.tracing.calls import call_of_root, is_default_call
from normfree.tracing.proxies import Proxy, Types

__all__ = ["Tracer"]


class Tracer(fx.Tracer):
    """Records, besides the graph, who owns each node and who returns it, and steps over what it cannot look into.

    Args:
        sites: Paths of the norms, or of what has taken their place.
        opaque: Paths of the modules that cannot be looked into, each with the reason.
        layers: Whether a module is a layer, by the identity of every module.
        functions: Functions to be taken for one operation each.
        inputs: The type of each argument by its name, or ``None`` where it is not known.

    Attributes:
        opaque: As given, and what was found meanwhile.
        again: A module could be looked into in one call and not in another: to be traced again, with it in ``opaque``.
    """

    def __init__(
        self,
        sites: frozenset[str] = frozenset(),
        opaque: Mapping[str, str] | None = None,
        layers: dict[int, bool] | None = None,
        functions: tuple[Callable[..., Any], ...] = (),
        inputs: Callable[[str], type | None] = lambda _: None,
    ) -> None:
        super().__init__(autowrap_functions=functions)
        self.sites = sites
        self.opaque = dict(opaque or {})
        self.again = False
        self.layers = layers or {}
        self.inputs = inputs
        self.stack: list[str] = [""]
        self.owners: dict[fx.Node, str] = {}
        self.called: list[str] = []
        self.optional: list[str] = []
        self.returned: list[tuple[fx.Node, str]] = []
        self.asked: set[str] = set()
        self.questioned: dict[int, None] = {}
        self.read: dict[str, str] = {}
        self._held: dict[int, str] = {}
        self._names: dict[int, str] | None = None
        self._erased: set[fx.Node] = set()
        self._parameters: dict[str, fx.Proxy] = {}

    @property
    def calls(self) -> dict[str, int]:
        """How often each module was called."""
        return Counter(self.called)

    @property
    def kinds(self) -> frozenset[str]:
        """The modules of whose class a forward asks."""
        modules = self.root.named_modules() if self.questioned else ()
        return frozenset(name for name, module in modules if id(module) in self.questioned)

    @property
    def exits(self) -> dict[fx.Node, tuple[str, ...]]:
        """The traced modules that return each node, innermost first."""
        found: dict[fx.Node, tuple[str, ...]] = {}
        for node, path in self.returned:
            found[node] = (*found.get(node, ()), path)
        return found

    def look(self, root: nn.Module, mode: str, constants: dict[str, Any]) -> fx.Graph:
        """Trace ``root`` in a mode and leave its modules as they were, whatever their forwards keep or count.

        Their own ``training`` flags are out of the way meanwhile, so that reading one is seen.
        """
        opened = [m for m in root.modules() if not self.layers[id(m)]]
        norms = {name: m for name, m in root.named_modules() if name in self.sites}
        self._held = {id(t): name for name, m in norms.items() for t in (*m.parameters(), *m.buffers())}
        kept = [(m.__dict__, dict(m.__dict__), _containers(m)) for m in opened]
        by_attribute = {cls for cls in {type(m) for m in opened} if not names_in(cls).isdisjoint(_CLASS_ATTRIBUTES)}
        self.questioned = {id(m): None for asking in opened if type(asking) in by_attribute for m in asking.modules()}
        for module in opened:
            del module.__dict__["training"]
            module._buffers["training"] = mode == "train"  # type: ignore[assignment]  # where __getattr__ looks
        try:
            self.types = Types(root, self.sites, self._type_inside, self.inputs)
            with answering(opened, self.types.of, lambda module: self.questioned.setdefault(id(module))):
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

    def create_args_for_root(
        self,
        root_fn: Callable[..., Any],
        is_module: bool,
        concrete_args: dict[str, Any] | tuple[Any, ...] | None = None,
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Make the call that a user makes; see :func:`normfree.tracing.calls.call_of_root`."""
        given = dict(concrete_args or {})
        call = call_of_root(self.root, root_fn, given, lambda name: self.create_proxy("placeholder", name, (), {}))
        return super().create_args_for_root(root_fn, is_module, concrete_args) if call is None else (call, [])

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
        self._parameters = parameter_proxy_cache
        if name not in self._parameters:
            self._parameters[name] = self.create_proxy("get_attr", name, (), {})
        return self._parameters[name]

    def create_arg(self, a: Any) -> Any:
        """Return what a node stores for an argument; the commonest kinds need none of torch.fx's searches."""
        kind = type(a)
        if kind is Proxy:
            return a.node
        if kind in _CONSTANTS:
            return a
        if kind is tuple:
            return tuple(self.create_arg(item) for item in a)
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Stop at norms, at layers, and at what was found untraceable."""
        return module_qualified_name in self.sites or module_qualified_name in self.opaque or self.layers[id(m)]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return a proxy that knows in-place arithmetic."""
        return Proxy(node, self)

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
        if self._erased and not self._erased.isdisjoint(node.all_input_nodes):
            raise TypeError("uses what a forward that cannot be traced has left behind")
        return node

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace the call of a module, or write it down as one operation where its forward fails on proxies.

        A module that a forward makes for itself, such as ``nn.Sequential(self.a, self.b)``, has no path: what it does
        belongs to whose forward that is.
        """
        if id(m) not in self.layers:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if not self.is_leaf_module(m, path):
            mark = self._mark()
            try:
                return self._look_into(m, path, forward, args, kwargs)
            except Exception as error:  # whatever the user's forward raises when it meets a proxy
                self._take_back(mark)
                self.opaque[path] = one_line(error)
                self.again = self.again or path in self.called
        self.called.append(path)
        return self.create_proxy("call_module", path, args, kwargs)

    def _look_into(
        self, m: nn.Module, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.called.append(path)
        if not is_default_call(m, args, kwargs):
            self.optional.append(path)
        self.stack.append(path)
        try:
            result = forward(*args, **kwargs)
        finally:
            self.stack.pop()
        if isinstance(result, fx.Proxy):
            self.returned.append((result.node, path))
        return result

    def _mark(self) -> tuple[int, ...]:
        return len(self.owners), len(self.opaque), len(self.called), len(self.returned), len(self.optional)

    def _take_back(self, mark: tuple[int, ...]) -> None:
        """Forget what was recorded since ``mark``."""
        for node in reversed(list(self.owners)[mark[0] :]):
            self.graph.erase_node(node)
            del self.owners[node]
            self._erased.add(node)
        for path in list(self.opaque)[mark[1] :]:
            del self.opaque[path]
        self.called, self.returned = self.called[: mark[2]], self.returned[: mark[3]]
        self.optional = self.optional[: mark[4]]
        for name in [name for name, proxy in self._parameters.items() if proxy.node in self._erased]:
            del self._parameters[name]

    def _type_inside(self, node: fx.Node) -> type | None:
        """Look into a module that is taken for one operation, to see what it returns, and take it back."""
        path = str(node.target)
        if path in self.opaque:
            return None
        mark = self._mark()
        args, kwargs = fx.map_arg((node.args, node.kwargs), cast(Any, self.proxy))
        try:
            result = self.root.get_submodule(path).forward(*args, **kwargs)
            return self.types.of(result.node) if isinstance(result, fx.Proxy) else type(result)
        except Exception:  # as in call_module
            return None
        finally:
            self._take_back(mark)


_CLASS_ATTRIBUTES = {"__class__", "_get_name"}
_CONSTANTS = {int, float, bool, str, type(None)}


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    """Return what a module keeps in dicts, lists and sets, each with a copy: a proxy cached there must not stay."""
    held = (value for name, value in module.__dict__.items() if not name.endswith("_hooks"))
    return [(value, value.copy()) for value in held if type(value) in (dict, OrderedDict, list, set)]
