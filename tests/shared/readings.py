"""What the tests read off a converted model."""

from __future__ import annotations

from torch import nn

import normfree


def plan_of(model: nn.Module) -> normfree.Plan:
    """Return the plan that a converted model carries."""
    return normfree.Plan.of(model)


def actions(model: nn.Module) -> dict[str, str]:
    """Return what became of every norm."""
    return {edit.name: edit.action for edit in plan_of(model).norms}


def kinds(model: nn.Module) -> list[str]:
    """Return the kind of every sum."""
    return [total.kind for total in plan_of(model).sums]


def alphas(model: nn.Module) -> list[str]:
    """Return the modules that carry an alpha, from the parameters and not from the plan."""
    return [name.removesuffix(".raw_alpha") for name, _ in model.named_parameters() if name.endswith(".raw_alpha")]


def norms(model: nn.Module) -> list[str]:
    """Return the names of the batch norms in the module tree."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
