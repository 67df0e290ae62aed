"""Which modules call a layer and the slot behind it in a row, and the class with which they call them together."""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Mapping
from types import FunctionType
from typing import Any, ClassVar, cast

import torch
from torch import nn

from normfree.code.functions import bases
from normfree.code.text import UNKNOWN, module_at
from normfree.errors import UsageError
from normfree.layers import ScaledOutput, scaled_output_class
from normfree.layers.pairs import OneByOne
from normfree.rewriting.changing import set_class
from normfree.rewriting.rows import Row, rows_in, with_rows

__all__ = ["Paired", "Spec", "paired_class", "specs", "unpaired_"]

Spec = tuple[tuple[str, tuple[tuple[int, int], ...]], ...]
"""The methods of a class that call pairs, each with the places in its text; empty for a sequence."""
Modules = Mapping[str, nn.Module]
Pairs = Mapping[int, int]
"""The identity of each layer with that of the slot behind it."""


class Paired(nn.Module):
    """Mixin for a module whose methods call a layer and its slot together; it is still what it was otherwise."""

    _normfree_before: ClassVar[type[nn.Module]]
    _normfree_spec: ClassVar[Spec]

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse TorchScript, which knows no class that is made at run time."""
        raise UsageError(f"{type(self).__name__} cannot be scripted: torch.jit.script(normfree.fuse(model).eval())")

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if reduced[0] is not copyreg.__newobj__ or "_normfree_before" not in vars(type(self)):  # type: ignore[attr-defined]
            return reduced
        return _empty, (self._normfree_before, self._normfree_spec), *reduced[2:]


def specs(modules: Modules, pairs: Mapping[str, str]) -> dict[str, Spec]:
    """Return the modules that call pairs in a row, with the methods that do, and the sequences in which pairs stand.

    ``pairs`` are the layers with the norms, or slots, behind them. The root is left out: it keeps its class.
    """
    identities = {id(modules[layer]): id(modules[norm]) for layer, norm in pairs.items()}
    members = {*identities, *identities.values()}
    ends = (*pairs, *pairs.values())
    above = {id(modules[name[:i]]): name[:i] for name in ends for i, letter in enumerate(name) if letter == "."}
    found: dict[str, Spec] = {}
    for name in above.values():
        module = modules[name]
        if _is_sequence(module):
            found |= {} if members.isdisjoint(map(id, _flat(module))) else {name: ()}
        elif not isinstance(module, torch.jit.ScriptModule):
            spec = _spec(module, identities)
            found |= {name: spec} if spec else {}
    return found


def paired_class(original: type[nn.Module], spec: Spec) -> type[nn.Module]:
    """Return the class of a module that calls pairs together.

    Raises:
        ValueError: The text of a method is not known, or is another one than it was.
        TypeError: No class may be derived from ``original``.
    """
    known = _MADE.get((original, spec))
    if known is not None:
        return known
    members: dict[str, Any] = {"_normfree_before": original, "_normfree_spec": spec}
    members |= {"__module__": original.__module__, "__qualname__": original.__qualname__}
    members["__doc__"] = original.__doc__
    for name, keys in spec:
        method = _method(original, name)
        if method is None:
            raise ValueError(f"{original.__qualname__} has no method {name} of its own")
        members[name] = with_rows(method, frozenset(keys))
    mixins = (Paired,) if spec else (Paired, OneByOne)
    made = type(original.__name__, (*mixins, original), members)
    return _MADE.setdefault((original, spec), made)


_MADE: dict[tuple[type[nn.Module], Spec], type[nn.Module]] = {}


def _empty(original: type[nn.Module], spec: Spec) -> nn.Module:
    """Return an object without contents, for pickle; where no text is known, of the class that it was."""
    try:
        cls = paired_class(original, spec)
    except (ValueError, TypeError):
        cls = original
    return cls.__new__(cls)


def unpaired_(model: nn.Module) -> None:
    """Give every module of a model the class back that it had."""
    for module in model.modules():
        cls = type(module)
        if "_normfree_before" in vars(cls):
            set_class(module, cast(Paired, module)._normfree_before)
        elif isinstance(module, Paired) and isinstance(module, ScaledOutput):
            mixin, inner = cls.__bases__
            set_class(module, scaled_output_class(vars(inner)["_normfree_before"], mixin))


def _is_sequence(module: nn.Module) -> bool:
    """Whether a module calls what it holds one after the other, and does nothing else."""
    if not isinstance(module, nn.Sequential) or "forward" in module.__dict__:
        return False
    deciding = ("forward", "__iter__", "__call__", "__len__")
    return all(getattr(type(module), name) is getattr(nn.Sequential, name) for name in deciding)


def _flat(module: nn.Module) -> list[nn.Module]:
    if not _is_sequence(module) or not len(module._modules):
        return [module]
    return [part for child in module._modules.values() for part in _flat(cast(nn.Module, child))]


def _spec(module: nn.Module, pairs: Pairs) -> Spec:
    spec = list[tuple[str, tuple[tuple[int, int], ...]]]()
    for name in dict.fromkeys(name for base in bases(type(module)) for name in vars(base)):
        method = _method(type(module), name)
        keys = [row.key for row in rows_in(method) if _is_pair(row, method, module, pairs)] if method else []
        if keys:
            spec.append((name, tuple(keys)))
    return tuple(spec)


def _method(cls: type, name: str) -> FunctionType | None:
    """Return the method that instances of a class have under a name, if it is a plain one."""
    found = inspect.getattr_static(cls, name, None)
    return found if isinstance(found, FunctionType) and not hasattr(found, "__wrapped__") else None


def _is_pair(row: Row, method: FunctionType, module: nn.Module, pairs: Pairs) -> bool:
    """Whether what is called in a row is a pair, or may be one: what a loop goes through is not known."""
    first, second = (module_at(end, method, module) for end in (row.first.func, row.second.func))
    if first is None or second is None:
        return False
    if first is UNKNOWN and second is UNKNOWN:
        return any(id(part) in pairs for part in module.modules())
    layer = None if first is UNKNOWN else id(_flat(first)[-1])
    slot = None if second is UNKNOWN else id(_flat(second)[0])
    return slot in pairs.values() if layer is None else layer in pairs and slot in (None, pairs[layer])
