"""Errors, sorted by who must act.

Every message says where (qualified module name and type), what was found, and what to do about it. Problems
are collected before anything is raised, so that one run shows all of them.

Example:
    >>> import normfree, torch
    >>> try:
    ...     normfree.convert(torch.nn.Linear(2, 2))
    ... except normfree.errors.NoNormError as error:
    ...     print(error)
    this Linear holds no batch normalisation: there is nothing to convert
"""

from __future__ import annotations

import importlib.util

__all__ = [
    "AlreadyConvertedError",
    "CheckpointError",
    "InexactError",
    "InternalError",
    "NoNormError",
    "NormfreeError",
    "OutputError",
    "SourceError",
    "UnseenWarning",
    "UnsupportedModelError",
    "UsageError",
    "WrappedModelError",
    "one_line",
    "some",
]


class NormfreeError(Exception):
    """Base of everything this package raises on purpose."""


class UsageError(NormfreeError, ValueError):
    """The caller must act: an argument is wrong, or the call cannot mean anything."""


class NoNormError(UsageError):
    """The model holds no batch normalisation, or none that the patterns let through."""


class AlreadyConvertedError(UsageError):
    """The model already carries normfree's layers."""


class WrappedModelError(UsageError):
    """The model is wrapped (DDP, FSDP, torch.compile, an EMA, Opacus, ScriptModule): convert what is inside."""


class SourceError(UsageError):
    """A model name no zoo knows."""


class OutputError(UsageError):
    """The output file cannot or must not be written."""


class CheckpointError(NormfreeError):
    """A checkpoint cannot be read, or does not belong to the model."""


class UnsupportedModelError(NormfreeError):
    """The model's author must act: something in the model has no exact conversion.

    Attributes:
        problems: One line a problem, each opening with the qualified module name.
    """

    def __init__(self, problems: tuple[str, ...]) -> None:
        self.problems = problems
        listed = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"{len(problems)} problem(s) prevent the conversion:\n{listed}")

    def __reduce__(self) -> tuple[type[UnsupportedModelError], tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)


class InexactError(NormfreeError):
    """A conversion that was to keep the function has not. It is not handed out."""


class UnseenWarning(UserWarning):
    """What is around some norms could not be seen: they go, but residual branches around them have no scalar."""


class InternalError(NormfreeError):
    """We must act: a plan and a model disagree in a way that no user can cause. Please report it."""


def one_line(error: Exception) -> str:
    """Return the kind and the first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


def some(names: list[str]) -> str:
    """Return the first five names and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def require(package: str, extra: str) -> None:
    """Refuse, before any work is done, what needs a package that an extra of normfree would bring.

    Raises:
        UsageError: The package is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"this needs {package}: pip install 'normfree[{extra}]'")
