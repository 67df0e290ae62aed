"""The main job: ``convert`` on a copy, ``convert_`` in place."""

from __future__ import annotations

from typing import Literal, TypeVar

from torch import nn

from normfree.planning.plan import look
from normfree.planning.selecting import Patterns
from normfree.rewriting.applying import rewrite
from normfree.rewriting.optimizers import warn_of_optimizers
from normfree.tracing.copying import deep_copy

__all__ = ["convert", "convert_"]

M = TypeVar("M", bound=nn.Module)


def convert_(
    model: M,
    *,
    init: Literal["auto", "skipinit", "preserve"] = "auto",
    alpha: float | Literal["rsqrt_depth"] | None = None,
    include: Patterns = (),
    exclude: Patterns = (),
    scope: Literal["all", "residual"] = "all",
    reset: bool = True,
    inplace_activations: bool = True,
) -> M:
    """Remove the batch normalisation of ``model`` in place and return it; see :func:`convert`.

    Convert before an optimizer takes the parameters: norms lose theirs, and layers gain new ones. A conversion that
    fails leaves the model bit for bit as it was.

    Warns:
        OptimizerWarning: An optimizer holds parameters that go; it and they are named.

    Example:
        >>> import normfree, torchvision
        >>> model = torchvision.models.resnet18()
        >>> normfree.convert_(model) is model
        True
    """
    made, moments = look(
        model,
        init=init,
        alpha=alpha,
        include=include,
        exclude=exclude,
        scope=scope,
        reset=reset,
        inplace_activations=inplace_activations,
    )
    met = moments()
    del moments  # it holds the norms, which would look as if an optimizer did
    warn_of_optimizers(model, made)
    rewrite(model, made, met)
    return model


def convert(
    model: M,
    *,
    init: Literal["auto", "skipinit", "preserve"] = "auto",
    alpha: float | Literal["rsqrt_depth"] | None = None,
    include: Patterns = (),
    exclude: Patterns = (),
    scope: Literal["all", "residual"] = "all",
    reset: bool = True,
    inplace_activations: bool = True,
) -> M:
    """Return a copy of ``model`` without batch normalisation: same class, same methods, one alpha a residual branch.

    SkipInit (De & Smith, NeurIPS 2020, section 4): a residual branch that starts near zero needs no normalisation.
    Every norm is removed, and the layer that fed it gets a bias. Under ``"preserve"`` weights, biases and alphas are
    learnt in units in which they train at the learning rates that the original liked: the weight behind a norm is kept
    times two, behind a constant of each channel, and learns as if its input had no mean; see
    :class:`normfree.plans.Units`.

    Args:
        model: Any module with batch normalisation in it; it is not changed.
        init: ``"skipinit"`` to train from scratch (alpha 0, weights drawn anew from He's distribution with torch's
            global generator), ``"preserve"`` to keep the function that ``model.eval()`` computes (alpha 1), ``"auto"``
            for ``"preserve"`` if any norm has been trained or is frozen, else ``"skipinit"``.
        alpha: Start of every scalar instead of 0 or 1; ``"rsqrt_depth"`` is ``1 / sqrt(number of scalars)``.
        include: Shell patterns (``"layer1.*"``) of norm names; only these are converted. Default: all.
        exclude: Shell patterns of norm names that stay, or of sum names whose branches get no scalar.
        scope: ``"residual"`` converts only the norms inside residual branches.
        reset: Whether ``"skipinit"`` draws the weights that a norm rescaled anew; ``False`` keeps yours.
        inplace_activations: ``False`` for what hooks layers, as Opacus does: no activation works in place any more,
            and what writes in place where a norm was gets a copy.

    Raises:
        NoNormError: There is nothing to convert, or the patterns leave nothing.
        AlreadyConvertedError: The model was converted before.
        WrappedModelError: The model is wrapped (DDP, FSDP, ``torch.compile``, an average of weights, Opacus) or a
            ScriptModule.
        UnsupportedModelError: Something in the model has no exact conversion; all of it is listed.
        UsageError: An argument makes no sense.

    Example:
        >>> import normfree, torchvision
        >>> model = normfree.convert(torchvision.models.resnet18())
        >>> model.layer1[0].conv2.alpha
        0.0
    """
    made, moments = look(
        model,
        init=init,
        alpha=alpha,
        include=include,
        exclude=exclude,
        scope=scope,
        reset=reset,
        inplace_activations=inplace_activations,
    )
    drawn, removed = [path for path, _ in made.drawn], [edit.name for edit in made.removed]
    converted = deep_copy(model, drawn, removed)
    rewrite(converted, made, moments())
    return converted
