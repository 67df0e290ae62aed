"""Who holds a layer besides the module that it belongs to: lists, closures, bound methods, objects of any kind."""

from __future__ import annotations

import functools
import gc
import inspect
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Set
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from normfree.code.functions import is_dunder, is_foreign, methods_of, named_by
from normfree.code.reach import Function, forward_functions, functions_of

__all__ = ["Held", "reached"]

_ATOMS = (int, float, str, bytes, bool, type(None), ModuleType, CodeType, BuiltinFunctionType, torch.dtype)
_METHODS = (property, staticmethod, classmethod, functools.cached_property)
_MOST = 1000
"""Functions of objects that are read: a second's work."""
_NOTHING = (*_ATOMS, Tensor)
_EMPTY = (dict, OrderedDict)  # most of what a module holds: hooks that nobody has hung
_KEEPERS = ("builtins", "functools", "collections", "types")
_BUILDING = ("__init__", "__post_init__", "__new__")
_ASIDE = {"__repr__", "__str__", "__format__", "__eq__", "__ne__", "__hash__", "__dir__", "__sizeof__", "__del__"}
_ASIDE |= {"__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__copy__", "__deepcopy__", *_BUILDING}
_ASIDE |= {"__init_subclass__", "__set_name__", "__class_getitem__", "__subclasshook__"}
"""Methods of an object that are not on the way of what passes through a model: they show, compare, copy or make it."""
_OWN = ("_parameters", "_buffers", "_modules")


class Held:
    """What a model holds, and what its functions name.

    Attributes:
        called: The identities of modules that something holds besides their parent.
        read: Those of modules whose weight or bias it holds.
        functions: The functions that were met, with what Python itself calls of the objects that were.
        methods: The other methods of these objects, by their names.
        owners: All of them, with the classes of the methods.
        bound: The identities of modules whose ``forward`` it holds.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = modules = {id(m): m for m in model.modules()}
        own = {id(p): (n, id(m)) for m in modules.values() for n, p in m._parameters.items() if n in ("weight", "bias")}
        own.pop(id(None), None)
        self._owners = own
        parents = Counter(id(child) for m in modules.values() for child in m._modules.values())
        self.called = {module for module, count in parents.items() if count > 1}
        self.read: dict[str, set[int]] = {"weight": set(), "bias": set()}
        self.functions: list[FunctionType] = []
        self.methods: dict[str, list[FunctionType]] = defaultdict(list)
        self.owners: dict[FunctionType, type | None] = {}
        self.bound: set[int] = set()
        self._classes: dict[bool, set[type]] = {False: set(), True: set()}  # of objects, and what may be made
        self._kinds = {cls for m in modules.values() for cls in type(m).__mro__}
        self._seen: dict[int, Any] = {}  # holds them, so that no other gets their identity
        kept = (value for m in modules.values() for name, value in vars(m).items() if name not in _OWN)
        self.follow(value for value in kept if type(value) not in _ATOMS and (type(value) not in _EMPTY or value))
        for cls in self._kinds:
            self.follow(_within(cls))

    def follow(self, values: Iterable[Any]) -> None:
        """Note what some values are, and what they hold."""
        waiting = list(values)
        while waiting:
            value = waiting.pop()
            if id(value) in self._modules:
                self.called.add(id(value))
            elif id(value) in self._owners:
                name, owner = self._owners[id(value)]
                self.read[name].add(owner)
            elif id(value) not in self._seen and not isinstance(value, _NOTHING):
                self._seen[id(value)] = value
                waiting += _within(value)
                if isinstance(value, MethodType) and id(value.__self__) in self._modules:  # of the class as it is now
                    self.bound |= {id(value.__self__)} if value.__name__ == "forward" else set()
                    for owners in self.read.values():
                        owners.add(id(value.__self__))
                if isinstance(value, FunctionType):
                    self.functions.append(value)
                    self.owners.setdefault(value, inspect.getclosurevars(value).nonlocals.get("__class__"))
                self._note_methods(value if isinstance(value, type) else type(value), made=False)

    def _note_methods(self, cls: type, *, made: bool) -> None:
        """Note what may be called of an object, or where one is made; Python itself calls some by no name."""
        for base in cls.__mro__ if cls not in self._classes[made] else ():
            if not is_foreign(base) and base not in self._kinds:
                for name, method in methods_of(base):
                    by_python = is_dunder(name) and name not in _ASIDE
                    building = name in _BUILDING and made and not issubclass(base, nn.Module)
                    (self.functions if by_python or building else self.methods[name]).append(method)
                    self.owners[method] = base
        self._classes[made].add(cls)

    def settle(self, reach: Callable[[], Set[FunctionType]], *, forward: bool) -> Set[FunctionType]:
        """Return what functions come to; what these name is held, too, and may bring others.

        What no forward comes to may make objects as well, if it stands in a file of the model's.
        """
        met, found, files = -1, reach(), {cls.__module__ for cls in self._kinds if not is_foreign(cls)}
        while met < len(self._seen) and (forward or len(self.owners) <= _MOST):
            met = len(self._seen)
            for function in found:
                cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
                values = [
                    *named_by(function),
                    *(value for name, cell in cells if name != "__class__" for value in _in(cell)),
                ]
                for cls in values if forward or function.__module__ in files else ():
                    if isinstance(cls, type):
                        self._note_methods(cls, made=True)
                own = [value for value in values if _may_hold(value) and not isinstance(value, type)]
                made = (value for value in values if isinstance(value, FunctionType) and is_foreign(value))
                self.follow([*own, *_within(function), *(cell for value in made for cell in value.__closure__ or ())])
            found = reach()
        return found


def _in(cell: CellType) -> Iterable[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # it is empty
        return []


def _within(value: Any) -> Iterable[Any]:
    if isinstance(value, FunctionType):  # its globals are not the model's
        defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        return [*(value.__closure__ or ()), *defaults, *vars(value).values()]
    if isinstance(value, type):
        return [] if is_foreign(value) else [part for part in vars(value).values() if _may_hold(part)]
    return [value.__self__, value.__func__] if isinstance(value, MethodType) else gc.get_referents(value)


def reached(model: nn.Module) -> tuple[Held, list[Function]]:
    """Return what a model holds, with what its functions name, and these functions.

    Of libraries whose classes lead anywhere not all is read: then every layer counts as called by what is not.
    """
    held = Held(model)
    forward = held.settle(lambda: forward_functions(model, held.functions, held.methods), forward=True)
    own = {function: cls for function, cls in held.owners.items() if function in forward}
    held.settle(lambda: {function.whole for function in functions_of(model, forward, held.owners)}, forward=False)
    if len(held.owners) <= _MOST:
        return held, list(functions_of(model, forward, held.owners))
    held.called.update(map(id, model.modules()))
    return held, list(functions_of(model, forward, own))


def _may_hold(value: object) -> bool:
    """Whether a value of a file may hold a layer, or come to one: a list, a partial, an object of somebody's class."""
    kind = type(value)
    plain = isinstance(value, (nn.Module, FunctionType, *_METHODS))
    return not plain and (kind.__module__ in _KEEPERS or not is_foreign(kind))
