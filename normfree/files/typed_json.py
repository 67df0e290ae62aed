"""Dataclasses from what JSON holds, strictly: a file may say anything, and each value must be what its field says."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

__all__ = ["from_plain"]


def from_plain(kind: Any, value: Any, where: str = "") -> Any:
    """Return ``value`` as ``kind``: a dataclass, ``tuple``, ``X | None``, ``Literal``, text, truth value or number.

    Fields of a dataclass that are missing keep their defaults. Numbers are finite, and whole ones below 2^31.

    Raises:
        ValueError: It is something else; the message says where.

    Example:
        >>> from normfree.files.typed_json import from_plain
        >>> from_plain(tuple[int, ...], [1, 2])
        (1, 2)
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(kind, value, where)
    if origin in (types.UnionType, typing.Union):  # of one kind and None
        return None if value is None else from_plain(arguments[0], value, where)
    if origin is Literal and isinstance(value, str) and value in arguments:
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = (arguments[0],) * len(value) if arguments[1:] == (...,) else arguments
        if len(kinds) == len(value):
            return tuple(from_plain(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind is int and type(value) is int and abs(value) < 2**31:
        return value
    if kind in (str, bool) and type(value) is kind:
        return value
    raise ValueError(f"{where or 'value'} is {_short(value)}, where {getattr(kind, '__name__', kind)} is expected")


def _dataclass(kind: type, value: Any, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    if not isinstance(value, Mapping) or not value.keys() <= hints.keys():
        raise ValueError(f"{where or kind.__name__} is {_short(value)}, where {', '.join(hints)} are expected")
    inside = {name: from_plain(hints[name], item, f"{where}.{name}".strip(".")) for name, item in value.items()}
    try:
        return kind(**inside)
    except TypeError as error:
        raise ValueError(f"{where or kind.__name__}: {error}") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
