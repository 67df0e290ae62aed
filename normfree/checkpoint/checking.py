"""What ``save`` asks before it writes: will ``load`` be able to read it, and what will it have to be given?"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from normfree import zoo
from normfree.checkpoint.header import Header
from normfree.checkpoint.loading import applied_to_empty
from normfree.errors import CheckpointError, SourceError, UsageError
from normfree.files import check_fits
from normfree.layers import is_normfree
from normfree.layers.reparametrized import check_plain

__all__ = ["SaveWarning", "loadable"]


class SaveWarning(UserWarning):
    """What is written can be loaded only with the original at hand."""


def loadable(
    model: nn.Module, header: Header, source: str | None, num_classes: int | None, state: Mapping[str, Tensor]
) -> Header:
    """Return a header with which ``load`` builds this very model; of it the caller has said the source and the classes.

    Raises:
        UsageError: The architecture that is named is not this model's, or a layer is not plain.

    Warns:
        SaveWarning: Nobody knows the architecture: ``load`` will want ``model=``.
    """
    plan = header.plan
    touched = {edit.producer or "" for edit in plan.removed} | {*plan.biases, *(layer.path for layer in plan.carried)}
    touched |= {name for name, module in model.named_modules() if is_normfree(module)}
    check_plain(model, touched - {""}, "save")
    problem = _problem(header, state)
    if problem is None:
        return header
    if source is not None:
        raise UsageError(f"load could not read this {type(model).__name__} as {source}: {problem}")
    warnings.warn(
        f"no source= names the architecture of this {type(model).__name__}: to load the file, pass the "
        "original architecture, load(path, model=...)",
        SaveWarning,
        stacklevel=3,
    )
    return replace(header, source=None, num_classes=num_classes)


def _problem(header: Header, state: Mapping[str, Tensor]) -> str | None:
    """Say why the architecture that is named is not the model's, by building it without memory."""
    if header.source is None:
        return "none is named"
    hint = "if only the classifier differs, give its num_classes"
    try:
        empty = applied_to_empty(header, header.source, zoo.find(header.source), header.num_classes)
        check_fits(empty.state_dict(keep_vars=True), state, header.source, hint)
    except (CheckpointError, SourceError) as error:
        return str(error)
    return None
