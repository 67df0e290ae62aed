"""The main job: ``convert`` on a copy, ``convert_`` in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn

from normfree.analysis.moments import Moments
from normfree.checkpoint.header import read_plan
from normfree.errors import InternalError, UnseenWarning, UsageError, some
from normfree.options import Asked, Options, takes_options
from normfree.planning.plan import look, look_again
from normfree.plans import Plan
from normfree.rewriting.applying import check_plan, rewrite
from normfree.rewriting.comparing import rewrite_and_compare
from normfree.rewriting.optimizers import warn_of_optimizers
from normfree.tracing.copying import deep_copy
from normfree.tracing.inputs import Inputs
from normfree.tracing.randomness import with_memory

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["FrozenWarning", "convert", "convert_"]

M = TypeVar("M", bound=nn.Module)


class FrozenWarning(UserWarning):
    """A frozen layer gets what only training makes good: a scalar of zero, or weights that are drawn anew."""


@takes_options
def convert_(
    model: M,
    *,
    plan: Plan | str | Path | None = None,
    check: bool = True,
    **options: Unpack[Asked],
) -> M:
    """Remove the batch normalisation of ``model`` in place and return it; see :func:`convert`.

    Convert before an optimizer takes the parameters: norms lose theirs, and layers gain new ones. A conversion that
    fails leaves the model bit for bit as it was.

    Warns:
        OptimizerWarning: An optimizer holds parameters that go; it and they are named.
        UnseenWarning: As there.
        FrozenWarning: As there.

    Example:
        >>> import normfree, torchvision
        >>> model = torchvision.models.resnet18()
        >>> normfree.convert_(model) is model
        True
    """
    asked = Options(**options)
    made, met = _planned(model, plan, asked)
    warn_of_optimizers(model, made)
    with torch.inference_mode(any(parameter.is_inference() for parameter in model.parameters())):  # as its own are
        _apply(model, made, met, asked.inputs, check)
    return model


@takes_options
def convert(
    model: M,
    *,
    plan: Plan | str | Path | None = None,
    check: bool = True,
    **options: Unpack[Asked],
) -> M:
    """Return a copy of ``model`` without batch normalisation: same class, same methods, one alpha a residual branch.

    SkipInit (De & Smith, NeurIPS 2020, section 4): a residual branch that starts near zero needs no normalisation.
    Every norm is removed. The layer that fed it gets a bias, or under ``"preserve"`` takes gain, bias and alpha from
    where the norm was, as it runs: whoever calls one of the two alone gets what he always got. There all are learnt in
    units in which they train at the learning rates that the original liked: behind a constant of each
    channel, as if the input had no mean, and with less of the mean of each filter; see :class:`normfree.edits.Units`.

    Args:
        model: Any module with batch normalisation in it; it is not changed.
        init: ``"skipinit"`` to train from scratch (alpha 0, weights drawn anew from He's distribution with torch's
            global generator), ``"preserve"`` to keep the function that ``model.eval()`` computes (alpha 1), ``"auto"``
            for ``"preserve"`` if any norm has been trained (its statistics or its beta have moved) or is frozen, else
            ``"skipinit"``; an error where nothing tells.
        alpha: Start of every scalar instead of 0 or 1; ``"rsqrt_depth"`` is ``1 / sqrt(number of scalars)``.
        include: Shell patterns (``"layer1.*"``) of norm names; only these are converted. Default: all.
        exclude: Shell patterns of norm names that stay, or of sum names whose branches get no scalar.
        scope: ``"residual"`` converts only the norms inside residual branches.
        reset: Whether ``"skipinit"`` draws the weights that a norm rescaled anew; ``False`` keeps yours.
        inplace_activations: ``False`` for what hooks layers, as Opacus does: no activation works in place any more,
            and what writes in place where a norm was gets a copy.
        inputs: Arguments with which ``model`` runs: a tensor ``(N, C, *)``, a tuple, or a mapping of keyword
            arguments. Only shapes and types matter. What the conversion does is read from one run on them, without
            memory where that is possible. Default: found from timm's configuration, the first layer, or what
            transformers' models say of themselves.
        plan: A plan to apply instead of making one, with no other argument: a :class:`normfree.Plan`, its JSON, or the
            file or folder that holds it. So a checkpoint of a converted model finds what it was saved from.
        check: Whether ``"preserve"`` compares the outputs of original and copy on a small input before it returns.

    Raises:
        NoNormError: There is nothing to convert, or the patterns leave nothing.
        AlreadyConvertedError: The model was converted before.
        WrappedModelError: The model is wrapped (DDP, FSDP, ``torch.compile``, an average of weights, Opacus) or a
            ScriptModule.
        UnsupportedModelError: Something in the model has no exact conversion; all of it is listed.
        UsageError: An argument makes no sense, or the plan is one of another model.
        CheckpointError: There is no plan to be read.
        InexactError: The copy computes something else than the original, which is an error of this package.

    Warns:
        UnseenWarning: Norms did not run: what is around them could not be seen, and ``inputs`` is the way out.
        FrozenWarning: A layer with ``requires_grad=False`` would get an alpha of zero, or weights that are drawn anew,
            and keep them for good; all are named.

    Example:
        >>> import normfree, torchvision
        >>> model = normfree.convert(torchvision.models.resnet18())
        >>> model.layer1[0].conv2.alpha
        0.0
    """
    asked = Options(**options)
    made, met = _planned(model, plan, asked)
    drawn, removed = [path for path, _ in made.drawn], [edit.name for edit in made.removed]
    with torch.inference_mode(False):  # in which no parameter could be made that trains
        converted = deep_copy(model, drawn, removed)
        _apply(converted, made, met, asked.inputs, check)
    return converted


def _apply(model: nn.Module, made: Plan, met: dict[str, Moments], inputs: Inputs | None, check: bool) -> None:
    with with_memory():
        if check:
            rewrite_and_compare(model, made, met, inputs)
        else:
            rewrite(model, made, met)


def _planned(model: nn.Module, plan: Plan | str | Path | None, asked: Options) -> tuple[Plan, dict[str, Moments]]:
    """Return the plan that is made or given, and what its carried layers meet; warn of what it cannot make good."""
    made, moments = look(model, asked) if plan is None else _given(model, plan, asked)
    if made.unseen and "" in dict(made.opaque):
        warnings.warn(made.warning, UnseenWarning, stacklevel=3)
    _warn_of_frozen(model, made)
    return made, moments()


def _given(model: nn.Module, plan: Plan | str | Path, asked: Options) -> tuple[Plan, Callable[[], dict[str, Moments]]]:
    both = [f.name for f in fields(Options) if f.name != "inputs" and getattr(asked, f.name) != f.default]
    if both:
        raise UsageError(f"a plan says all that {', '.join(both)} would say: give the one or the other")
    made = plan if isinstance(plan, Plan) else read_plan(plan)
    moments = look_again(model, made, asked.inputs)
    try:
        check_plan(model, made)
    except InternalError as error:
        raise UsageError(f"the plan is not one of this {type(model).__name__}: {error}") from error
    return made, moments


def _warn_of_frozen(model: nn.Module, made: Plan) -> None:
    """Name what would stay closed or random, as nobody trains it."""
    closed = [a.path for a in made.alphas if made.alpha == 0 and _is_frozen(model.get_submodule(a.path), model)]
    drawn = [path for path, _ in made.drawn if _is_frozen(model.get_submodule(path), model)]
    said = [*([f"alpha is 0 at {some(closed)}"] if closed else []), *([f"drawn anew: {some(drawn)}"] if drawn else [])]
    if said:
        text = (
            f"frozen layers (requires_grad=False) keep for good what they get: {'; '.join(said)}. Unfreeze them before "
            "the conversion, or use init='preserve'"
        )
        warnings.warn(text, FrozenWarning, stacklevel=4)


def _is_frozen(layer: nn.Module, model: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    parameters = [weight] if weight is not None else list(layer.parameters()) or list(model.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
