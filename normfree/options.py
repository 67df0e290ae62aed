"""What can be asked of a conversion, written once: for ``convert``, ``convert_``, ``plan`` and the command line."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Literal, TypedDict, TypeVar

from normfree.errors import UsageError
from normfree.tracing.inputs import Inputs

__all__ = ["Asked", "Options", "Patterns", "matches", "takes_options"]

Patterns = str | Sequence[str]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Options:
    """The options of :func:`normfree.convert`, which says what they mean; one pattern becomes a tuple of one.

    Raises:
        UsageError: One of them makes no sense.
    """

    init: Literal["auto", "skipinit", "preserve"] = "auto"
    alpha: float | Literal["rsqrt_depth"] | None = None
    include: Patterns = ()
    exclude: Patterns = ()
    scope: Literal["all", "residual"] = "all"
    reset: bool = True
    inplace_activations: bool = True
    inputs: Inputs | None = None

    def __post_init__(self) -> None:
        if self.init not in ("auto", "skipinit", "preserve"):
            raise UsageError(f"init is {self.init!r}; it must be 'auto', 'skipinit' or 'preserve'")
        if self.scope not in ("all", "residual"):
            raise UsageError(f"scope is {self.scope!r}; it must be 'all' or 'residual'")
        alpha = self.alpha
        number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool) and math.isfinite(alpha)
        if not (alpha is None or alpha == "rsqrt_depth" or number):
            raise UsageError(f"alpha is {alpha!r}; it must be a finite number or 'rsqrt_depth'")
        for name in ("include", "exclude"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))


class Asked(TypedDict, total=False):
    """The same as keyword arguments, for type checkers."""

    init: Literal["auto", "skipinit", "preserve"]
    alpha: float | Literal["rsqrt_depth"] | None
    include: Patterns
    exclude: Patterns
    scope: Literal["all", "residual"]
    reset: bool
    inplace_activations: bool
    inputs: Inputs | None


def matches(name: str, patterns: Patterns) -> bool:
    """Whether ``name`` matches one of the shell patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def takes_options(function: F) -> F:
    """Let ``help`` and completion show the options of a function that takes them as ``**options``."""
    signature = inspect.signature(function)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(Options)
    ]
    parameters = sorted([*options, *own], key=lambda parameter: parameter.kind)
    function.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return function
