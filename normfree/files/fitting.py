"""Whether tensors belong to a model, told from names, shapes and types: before anything is allocated or copied."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from normfree.errors import CheckpointError, some
from normfree.files.entries import shared_prefix

__all__ = ["check_fits", "load_weights", "prefix_of", "take", "without_prefix"]


def check_fits(own: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str, hint: str = "") -> None:
    """Hold what was found in a file to what a model has; batch counters, which old files lack, aside.

    Args:
        own: The state of the model; only names, shapes and types count. Names of one tensor need one entry in the file.
        found: What is in the file.
        where: How the message begins.
        hint: What may help if only one or two shapes differ, or no name is the same.

    Raises:
        CheckpointError: Names, shapes or types differ; the first of each kind are listed.
    """
    here = {id(own[key]) for key in found if key in own}
    missing = [k for k in own if k not in found and id(own[k]) not in here and not k.endswith("num_batches_tracked")]
    both = [key for key in own if key in found]
    shapes = [
        f"{key[:100]} is {tuple(found[key].shape)}, the model wants {tuple(own[key].shape)}"
        for key in both
        if found[key].shape != own[key].shape
    ]
    types = [
        f"{key[:100]} is {found[key].dtype}, the model wants {own[key].dtype}"
        for key in both
        if _kind(found[key]) != _kind(own[key]) and not key.endswith("num_batches_tracked")
    ]
    named = {
        "missing": missing,
        "unexpected": [key for key in found if key not in own],
        "other shapes": shapes,
        "other types": types,
    }
    lines = [f"  {what}: {some([text[:200] for text in texts])}" for what, texts in named.items() if texts]
    if lines and hint and (0 < len(shapes) < 3 or not both):
        lines.append(f"  {hint}")
    if lines:
        raise CheckpointError("\n".join([f"{where}:", *lines]))


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def load_weights(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> str:
    """Load ``state`` into ``model``, strictly; return the prefix that all of its names had and the model's have not.

    Raises:
        CheckpointError: Names, shapes or types differ; nothing is loaded.
    """
    prefix = prefix_of(model, state, path)
    take(model, {key.removeprefix(prefix): value for key, value in state.items()})
    return prefix


def prefix_of(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> str:
    """Hold ``state`` to ``model``; return the prefix that all of its names have and the model's have not.

    Raises:
        CheckpointError: Names, shapes or types differ.
    """
    own = model.state_dict(keep_vars=True)
    prefix = shared_prefix(own, state)
    where = f"{path}: the checkpoint is not one of this {type(model).__name__}"
    found = {key.removeprefix(prefix): value for key, value in state.items()}
    wide = {found[k].shape[:1] for k in own.keys() & found.keys() if own[k].shape != found[k].shape}
    classes = f" {wide.pop()[0]}" if len(wide) == 1 and next(iter(wide)) else ""
    hint = f"if only the classifier differs, give num_classes= (--num-classes{classes})"
    partly = "" if prefix else shared_prefix(own, state, by_all=False)
    hint = f"the model's names are there behind {partly!r}: --prefix {partly}" if partly else hint
    check_fits(own, found, where, hint)
    return prefix


def without_prefix(prefix: str, path: str | Path) -> str:
    """Say that a prefix came off, if one did."""
    return f"{path}: without the prefix {prefix!r} of its names" if prefix else ""


def take(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what :func:`check_fits` has let through.

    Files say no versions of modules: they are taken to be the model's (torchvision's MNASNet refuses to load none).
    """
    versioned = OrderedDict(state)
    versioned._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]  # torch's own convention
    model.load_state_dict(versioned, strict=False)
