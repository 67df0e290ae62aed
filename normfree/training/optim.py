"""The optimiser's side: what gets no weight decay, what learns at a rate of its own, what clipping must leave alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from normfree.errors import UsageError
from normfree.layers import HasAlpha
from normfree.plans import plan_on

__all__ = ["SCALAR_RATE", "clip_grad", "clipped_parameters", "param_groups"]

SCALAR_RATE = 0.1
"""Learning rate of the scalars over that of the weights by default (a tenth, as Fixup's authors use: ICLR 2019)."""


def param_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, scalar_lr: float | None = None
) -> list[dict[str, Any]]:
    """Return parameter groups for any torch optimizer, or for timm's ``create_optimizer_v2``.

    Weight decay pulls a scalar or a gain towards deleting its branch, so none of them gets it, as in De & Smith
    (NeurIPS 2020, section 4) and in the authors' code. A scalar sees the gradient of a whole branch: it learns slower.

    Args:
        model: A converted model. Any other model works too: it has no scalars.
        lr: Learning rate of weights, gains and biases.
        weight_decay: Weight decay of the weights; biases, gains and every other vector get none.
        scalar_lr: Learning rate of the alphas. Default: ``lr`` where they have a unit of their own, in which they learn
            slower already (``preserve``), else ``lr`` times :data:`SCALAR_RATE`. From alpha = 0 with SGD, 0.3
            whatever ``lr`` is trained in a wider range of learning rates (``examples/results/recipe.md``).

    Returns:
        Up to three groups, named by their key ``name``: ``weights``, ``vectors`` and ``scalars``. Parameters that
        do not require a gradient are left out, and one that is registered twice appears once.

    Raises:
        UsageError: A rate is negative, or nothing in the model requires a gradient.

    Example:
        >>> import torch, torchvision, normfree
        >>> model = normfree.convert(torchvision.models.resnet18())
        >>> groups = normfree.param_groups(model, lr=0.1, weight_decay=1e-4)
        >>> optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
        >>> [(g["name"], len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
        [('weights', 21, 0.1, 0.0001), ('vectors', 21, 0.1, 0.0), ('scalars', 8, 0.010000000000000002, 0.0)]
    """
    carriers = list(_carriers(model))
    if scalar_lr is None:
        scalar_lr = lr if any(carrier.alpha_unit > 1 for carrier in carriers) else lr * SCALAR_RATE
    if min(lr, weight_decay, scalar_lr) < 0:
        raise UsageError(f"rates cannot be negative: lr {lr}, weight_decay {weight_decay}, scalar_lr {scalar_lr}")
    scalars = {id(carrier.raw_alpha) for carrier in carriers}
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise UsageError(f"nothing in this {type(model).__name__} requires a gradient")
    groups: list[dict[str, Any]] = [
        {"name": "weights", "params": [p for p in trained if p.dim() > 1], "lr": lr, "weight_decay": weight_decay},
        {
            "name": "vectors",
            "params": [p for p in trained if p.dim() <= 1 and id(p) not in scalars],
            "lr": lr,
            "weight_decay": 0.0,
        },
        {"name": "scalars", "params": [p for p in trained if id(p) in scalars], "lr": scalar_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def clip_grad(model: nn.Module, clip_factor: float = 0.01, eps: float = 1e-3) -> None:
    """Clip gradients adaptively, unit by unit, where that makes sense in a converted model.

    Brock et al. (2021, section 4.1, equation 3) bound each row's gradient by ``clip_factor`` times the row's own norm.
    A scalar that starts at zero has no norm to speak of, and its gradient would be cut from 1 to ``clip_factor * eps``:
    so alphas and biases are exempt, and the last linear layer as in the paper. Under ``preserve`` alphas start at one,
    and they and the last layer are what diverges first: both are clipped. What clips is timm's function.

    Args:
        model: The model, after ``backward``.
        clip_factor: Largest ratio of a gradient's norm to its parameter's: λ in the paper.
        eps: Smallest norm that counts for a parameter.

    Example:
        >>> import torch, torchvision, normfree
        >>> model = normfree.convert(torchvision.models.resnet18(num_classes=2))
        >>> model(torch.randn(2, 3, 64, 64)).sum().backward()
        >>> normfree.clip_grad(model, clip_factor=0.01)
    """
    from timm.utils import agc

    clip: Callable[..., None] = agc.adaptive_clip_grad
    clip(list(clipped_parameters(model)), clip_factor=clip_factor, eps=eps)


def clipped_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield what adaptive clipping may touch: weights, from scratch without the classifier's, else alphas too."""
    plan = plan_on(model)
    if plan is not None and plan.init == "preserve" and not plan.fused:
        taken = {id(carrier.raw_alpha) for carrier in _carriers(model)}
        yield from (p for p in model.parameters() if p.dim() > 1 or id(p) in taken)
        return
    last = _classifier(model)
    exempt = {id(p) for p in last.parameters()} if last is not None else set()
    yield from (p for p in model.parameters() if p.dim() > 1 and id(p) not in exempt)


def _classifier(model: nn.Module) -> nn.Module | None:
    """Return the last linear layer: what timm's models name, else the last that is registered."""
    named = getattr(model, "get_classifier", None)
    found = named() if callable(named) else None
    if isinstance(found, nn.Module):
        return found
    return next((module for module in reversed(list(model.modules())) if isinstance(module, nn.Linear)), None)


def _carriers(model: nn.Module) -> Iterator[HasAlpha]:
    """Yield the modules that carry an alpha."""
    for module in model.modules():
        if isinstance(module, HasAlpha) and module._parameters.get("raw_alpha") is not None:
            yield module
