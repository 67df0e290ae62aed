"""One conversion beside another of the same original: what each module is, holds, shares, and is hooked by."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["departures", "settings"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OWN = {"training", "_normfree_plan", "_normfree_originals", "_parameters", "_buffers", "_modules"}
_OWN |= {"_is_full_backward_hook", "_compiled_call_impl", "__overloads__"}  # of whoever looks on, or compiles
_PLAIN = (bool, int, float, str, type(None))
Problem = tuple[str, str]
"""What is wrong, and where."""


def departures(made: nn.Module, model: nn.Module) -> dict[str, list[str]]:
    """Say where ``model`` is not what ``made`` is, values aside; places are sorted by what is wrong there."""
    ours, theirs = (dict(m.named_modules(remove_duplicate=False)) for m in (made, model))
    problems: list[Problem] = [
        *(("modules lost", name) for name in ours.keys() - theirs.keys()),
        *(("modules unplanned", name) for name in theirs.keys() - ours.keys()),
        *(("keys lost", key) for key in made.state_dict().keys() - model.state_dict().keys()),
        *(("keys unplanned", key) for key in model.state_dict().keys() - made.state_dict().keys()),
    ]
    seen: set[tuple[int, int]] = set()
    for name in ours.keys() & theirs.keys():
        pair = ours[name], theirs[name]
        if (id(pair[0]), id(pair[1])) not in seen:  # a module that has two names is told of once
            seen.add((id(pair[0]), id(pair[1])))
            problems += [(what, f"{name}.{key}".strip(".") or "the root") for what, key in _of_module(*pair)]
    tensors = _tensors(made), _tensors(model)
    problems += [("shared otherwise", name) for name in _shared_otherwise(*tensors)]
    problems += [("another type", name) for name in _of_another_type(*tensors)]
    sorted_: dict[str, list[str]] = defaultdict(list)
    for what, where in sorted(problems):
        sorted_[what].append(where)
    return sorted_


def _of_module(made: nn.Module, module: nn.Module) -> Iterator[Problem]:
    if not _same_class(type(made), type(module)):
        yield "another class", ""
    if isinstance(made, torch.jit.ScriptModule):
        return  # a copy of one is another kind of thing than the original, and holds no norm
    for held in ("_parameters", "_buffers"):
        ours, theirs = (dict(getattr(m, held).items()) for m in (made, module))  # no dicts of a ScriptModule
        for key in ours.keys() | theirs.keys():
            what = _of_tensors(ours.get(key), theirs.get(key))
            if what is not None:
                yield what, key
    kept = ({*getattr(m, "_non_persistent_buffers_set", ())} & dict(m._buffers.items()).keys() for m in (made, module))
    yield from (("saved otherwise", key) for key in set.symmetric_difference(*kept))
    yield from (("another setting", key) for key in {key for key, _ in settings(made) ^ settings(module)})
    for hooks in _HOOKS:
        gone = Counter(_hooks(made, hooks)) - Counter(_hooks(module, hooks))
        yield from (("hooks gone", name) for name in gone)


def _of_tensors(made: Tensor | None, tensor: Tensor | None) -> str | None:
    if made is None or tensor is None:
        return None if made is tensor else "tensors lost" if tensor is None else "tensors unplanned"
    if isinstance(made, nn.Parameter) != isinstance(tensor, nn.Parameter):
        return "no parameter any more" if isinstance(made, nn.Parameter) else "a parameter now"
    if made.shape != tensor.shape:
        return "another shape"
    if made.requires_grad != tensor.requires_grad:
        return "requires_grad differs"
    return None


def settings(module: nn.Module) -> set[tuple[str, Any]]:
    """Return the settings of a module that can be compared; a tensor, a method or whatever else by its name only."""
    return {
        (key, value if _is_plain(value) else type(value).__name__)
        for key, value in module.__dict__.items()
        if key not in _OWN and not key.endswith(("_hooks", "_with_kwargs", "_always_called", "_set"))
    }


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (type(value) is tuple and all(map(_is_plain, value)))


def _same_class(a: type, b: type) -> bool:
    """Whether two classes are one, or were made at run time in the same way."""
    if a is b:
        return True
    alike = (a.__module__, a.__qualname__, a.__mro__[1:]) == (b.__module__, b.__qualname__, b.__mro__[1:])
    return alike and _code(a) == _code(b)


def _code(cls: type) -> dict[str, tuple[bytes, tuple[str, ...]]]:
    functions = {name: value for name, value in vars(cls).items() if isinstance(value, FunctionType)}
    return {name: (f.__code__.co_code, f.__code__.co_names) for name, f in functions.items()}


def _hooks(module: nn.Module, kind: str) -> Iterator[str]:
    for hook in getattr(module, kind, {}).values():
        function = getattr(hook, "__func__", hook)
        yield str(getattr(function, "__qualname__", type(hook).__qualname__))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])


def _of_another_type(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Iterator[str]:
    """Name the tensors whose type is not what that of the others has become: a model may be in half precision now."""
    pairs = {name: (ours[name].dtype, theirs[name].dtype) for name in ours.keys() & theirs.keys()}
    usual = dict(pair for pair, _ in reversed(Counter(pairs.values()).most_common()))
    yield from (name for name, (before, now) in pairs.items() if now not in (before, usual[before]))


def _shared_otherwise(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Iterator[str]:
    """Name the tensors that are one with others than they should be."""
    names = ours.keys() & theirs.keys()
    groups = []
    for tensors in (ours, theirs):
        by_identity: dict[int, set[str]] = defaultdict(set)
        for name in names:
            by_identity[id(tensors[name])].add(name)
        groups.append({name: by_identity[id(tensors[name])] for name in names})
    yield from (name for name in names if groups[0][name] != groups[1][name])
