"""``load``: build the architecture, apply the stored plan, take the weights, and hold everything to the file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from normfree import zoo
from normfree.checkpoint.header import Header, read_header, weights_in
from normfree.deployment.fuse import bake_
from normfree.edits import UNSEEN
from normfree.errors import CheckpointError, InternalError, NormfreeError, UsageError, some
from normfree.files import check_fits, read_state_dict, take
from normfree.options import Options
from normfree.planning.guards import check_is_module
from normfree.planning.plan import look
from normfree.plans import PLAN_ATTRIBUTE, Plan
from normfree.rewriting.applying import rewrite
from normfree.rewriting.originals import ORIGINALS_ATTRIBUTE
from normfree.tracing.copying import meta_copy

__all__ = ["applied_to_empty", "build_original", "load"]


def load(path: str | Path, model: nn.Module | None = None, *, num_classes: int | None = None) -> nn.Module:
    """Load a converted or fused model: build the architecture, apply the stored plan, load the weights strictly.

    Args:
        path: A file that :func:`save` wrote, or a folder.
        model: The original architecture with any weights, for what no zoo knows; it is converted in place.
        num_classes: Width of another classifier than the stored one: it is drawn anew, all else comes from the file.

    Raises:
        CheckpointError: The file is missing, damaged, not one of ours, or does not belong to the model: names or shapes
            differ, or the model is wired in another way, as far as it shows where it is run.
        UsageError: The file names no architecture and no ``model`` is given.

    Example:
        >>> import normfree, torchvision
        >>> model = normfree.convert(torchvision.models.resnet18(num_classes=10), init="preserve")
        >>> normfree.save(model, "ten.safetensors", source="torchvision:resnet18", num_classes=10)
        >>> normfree.load("ten.safetensors").fc.out_features
        10
        >>> normfree.load("ten.safetensors", num_classes=3).fc.out_features
        3
    """
    header = read_header(path)
    state = read_state_dict(weights_in(path))
    if model is None:
        # Without memory first: a file that names what it does not hold should not cost more than its own size.
        _fitting(applied_to_empty(header, path, num_classes), state, path, num_classes)
        model = build_original(header, path, num_classes=num_classes)
    else:
        check_is_module(model)
        _hold_to_plan(model, header.plan, path)
    _apply(model, header, path)
    floating = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(floating) == 1:
        model.to(floating.pop())  # a model saved in half precision comes back in half precision
    take(model, _fitting(model, state, path, num_classes))
    kept = header.kept(path)
    if kept is not None and ORIGINALS_ATTRIBUTE in model.__dict__:
        model.__dict__[ORIGINALS_ATTRIBUTE].fill_(kept, str(path))
    return model


def _hold_to_plan(model: nn.Module, stored: Plan, path: str | Path) -> None:
    """Refuse an architecture with the same names that does something else with them; what cannot be run is not held."""
    try:
        anew, _ = look(model, Options(init=stored.init))
    except NormfreeError:  # what is wrong with the model is told where the plan is applied
        return
    if anew.unseen or stored.unseen:
        return
    fed = {edit.name: edit.feed.partition(" (")[0] for edit in anew.norms if edit.feed != UNSEEN}
    problems = [
        f"{edit.name} is fed by {fed[edit.name]}, in the file by {edit.producer}"
        for edit in stored.norms
        if edit.producer is not None and fed.get(edit.name, edit.producer) != edit.producer
    ]
    adding = {total.name.rpartition(".")[0] for total in anew.sums}
    owners = dict.fromkeys(total.name.rpartition(".")[0] for total in stored.sums if total.alphas)
    problems += [f"{owner or 'its own forward'} adds nothing" for owner in owners if owner not in adding]
    if problems:
        raise CheckpointError(
            f"{path}: was written of another architecture than this {type(model).__name__}: {some(problems)}"
        )


def build_original(
    header: Header, path: str | Path, *, pretrained: bool = False, num_classes: int | None = None
) -> nn.Module:
    """Build the architecture that a file names, before its conversion."""
    source, classes = _architecture(header, path, num_classes)
    return zoo.build(source, pretrained=pretrained, num_classes=classes)


def applied_to_empty(header: Header, where: object, num_classes: int | None = None) -> nn.Module:
    """Return the architecture after the stored plan, without memory: its state has names, shapes and types only.

    Raises:
        CheckpointError: The plan does not fit.
        UsageError: No architecture is named.
    """
    source, classes = _architecture(header, where, num_classes)
    empty = meta_copy(zoo.skeleton(source, num_classes=classes))
    _apply(empty, header, where)
    return empty


def _architecture(header: Header, path: object, num_classes: int | None) -> tuple[zoo.Source, int | None]:
    if header.source is None:
        raise UsageError(f"{path} names no architecture, so only Python can read it: normfree.load(path, model=...)")
    return zoo.find(header.source), header.num_classes if num_classes is None else num_classes


def _apply(model: nn.Module, header: Header, path: object) -> None:
    """Give ``model`` the structure that the plan says; its weights come from the file, so none are drawn."""
    try:
        rewrite(model, dataclasses.replace(header.plan, reset=False, fused=False))
    except InternalError as error:
        raise CheckpointError(f"{path}: the stored plan does not fit this {type(model).__name__}: {error}") from error
    if header.plan.fused:
        bake_(model, header.plan.merged)
    model.__dict__[PLAN_ATTRIBUTE] = header.plan.to_json() if header.plan.fused else header.plan


def _fitting(
    model: nn.Module, state: Mapping[str, Tensor], path: str | Path, num_classes: int | None
) -> dict[str, Tensor]:
    """Hold weights to a model, and return those to be loaded: all, but for a classifier of another width."""
    own = model.state_dict(keep_vars=True)
    head = {
        key
        for key, tensor in state.items()
        if key in own
        and num_classes in own[key].shape[:1]
        and num_classes not in tensor.shape[:1]
        and tensor.shape[1:] == own[key].shape[1:]
    }
    found = {key: tensor for key, tensor in state.items() if key not in head}
    where = f"{path}: does not belong to this {type(model).__name__}"
    check_fits({key: tensor for key, tensor in own.items() if key not in head}, found, where)
    return found
