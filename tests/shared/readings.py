"""What the tests read off a converted model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from torch import nn

import normfree
from normfree.layers import pairs


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
    """Return the modules that alpha scales, from the parameters: a layer, where the slot behind it carries alpha."""
    layers = {slot: layer for layer, slot in plan_of(model).pairs.items()}
    found = [name.removesuffix(".raw_alpha") for name, _ in model.named_parameters() if name.endswith(".raw_alpha")]
    return [layers.get(name, name) for name in found]


def norms(model: nn.Module) -> list[str]:
    """Return the names of the batch norms in the module tree."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@contextmanager
def watched_pairs(model: nn.Module) -> Iterator[dict[str, str]]:
    """Yield the layers that compute as one with the slot behind them, while the model runs, with these slots."""
    names, found, merged = {module: name for name, module in model.named_modules()}, dict[str, str](), pairs.merged

    def noted(layer: nn.Module, slot: nn.Module) -> pairs.Affine:
        found[names[layer]] = names[slot]
        return merged(layer, slot)  # type: ignore[arg-type]  # what stands in for it knows

    with patch.object(pairs, "merged", noted):
        yield found
