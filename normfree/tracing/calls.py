"""How the module that is traced is called, and what of a call is the default one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor, fx, nn

__all__ = ["call_of_root", "is_default", "is_default_call"]

_Kind = inspect._ParameterKind


def call_of_root(
    root: nn.Module, forward: Callable[..., Any], constants: Mapping[str, Any], placeholder: Callable[[str], Any]
) -> Callable[[], Any] | None:
    """Return the call to trace, or ``None`` if its arguments cannot be told apart (``*levels``).

    torch.fx reads the parameters off the code that a decorator wraps, and calls the decorator with every one of them.
    Here the call is the one that a user makes: what has its default is left out, ``*more`` and ``**options`` are none.

    Args:
        root: The module.
        forward: Its forward as its class has it, decorators included.
        constants: The arguments that are no proxies; the names of ``*more`` and ``**options`` among them.
        placeholder: Makes the proxy of an argument; called for every parameter, in order.

    Raises:
        KeyError: The options are not known.
    """
    parameters = list(inspect.signature(root.forward).parameters.values())
    hidden = [p.kind for p in parameters] == [_Kind.VAR_POSITIONAL, _Kind.VAR_KEYWORD]  # a decorator that says nothing
    if not hidden and any(p.kind is _Kind.VAR_POSITIONAL and p.name not in constants for p in parameters):
        return None
    args: list[Any] = [root]
    kwargs: dict[str, Any] = {}
    by_keyword = False
    for parameter in parameters:
        if parameter.kind is _Kind.VAR_POSITIONAL and not hidden:
            args += constants[parameter.name]
            for i in range(len(constants[parameter.name])):
                placeholder(f"{parameter.name}_{i}")
            continue
        proxy = placeholder(parameter.name)
        if parameter.kind is _Kind.VAR_KEYWORD:
            kwargs.update(constants[parameter.name])
            continue
        value = constants.get(parameter.name, proxy)
        left_out = value is parameter.default
        by_keyword = by_keyword or left_out or parameter.kind is _Kind.KEYWORD_ONLY
        if by_keyword and not left_out:
            kwargs[parameter.name] = value
        elif not left_out:
            args.append(value)
    return lambda: _plain(forward(*args, **kwargs))


def _plain(result: Any) -> Any:
    """Return what a forward returns; of an object of a class of its own, the list of what it holds."""
    if isinstance(result, (fx.Proxy, Tensor, tuple, list, dict)) or is_dataclass(result):
        return result
    return list(vars(result).values()) if hasattr(result, "__dict__") else result


def is_default_call(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call gives an optional argument nothing but its default."""
    if len(args) + len(kwargs) <= 1 and not kwargs:
        return True  # most calls; the first argument is hardly ever optional
    signature = inspect.signature(module.forward)
    optional = {p.name: p.default for p in signature.parameters.values() if p.default is not p.empty}
    given = signature.bind(*args, **kwargs).arguments
    return all(is_default(given[name], default) for name, default in optional.items() if name in given)


def is_default(value: Any, default: Any) -> bool:
    """Whether a value is the default, or a number or text that is equal to it."""
    return value is default or (type(value) is type(default) and type(value) in _ATOMS and value == default)


_ATOMS = (int, float, bool, str)  # a tuple: torch 2.8 compiles no question to a set of classes
