"""What a ``preserve`` conversion takes away, kept to be put back: the norms, and the layers' old biases.

These are vectors, a few thousandths of a model. They are no part of its modules, parameters, buffers or state.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from normfree.errors import CheckpointError
from normfree.plans import Plan

__all__ = ["ORIGINALS_ATTRIBUTE", "Originals"]

ORIGINALS_ATTRIBUTE = "_normfree_originals"
"""Where a root that was converted with ``preserve`` keeps them."""


@dataclass(frozen=True)
class Originals:
    """What was taken away.

    Attributes:
        norms: Every norm, by the name it has in the plan.
        biases: The bias of every layer in front of a norm that takes its gain and bias, or ``None``.
    """

    norms: Mapping[str, nn.Module]
    biases: Mapping[str, nn.Parameter | None]

    @classmethod
    def of(cls, modules: Mapping[str, nn.Module], plan: Plan) -> Originals:
        """Copy what ``plan`` is about to take away: the user may go on with the model that it comes from."""
        memo: dict[int, Any] = {}
        norms = {edit.name: _kept(modules[edit.name], memo) for edit in plan.removed}
        biases = {path: modules[path]._parameters["bias"] for path in plan.pairs}
        return cls(norms, {path: None if bias is None else _copied(bias, memo) for path, bias in biases.items()})

    def __deepcopy__(self, memo: dict[int, Any]) -> Originals:
        norms = {path: _kept(norm, memo) for path, norm in self.norms.items()}
        for norm in norms.values():
            norm.__dict__["_modules"] = copy.deepcopy(norm._modules, memo)
        return Originals(norms, {path: None if b is None else _copied(b, memo) for path, b in self.biases.items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return everything by the key that it has in the state of the original model."""
        return {key: tensor.detach() for key, tensor in self._own().items()}

    def fill_(self, values: Mapping[str, Tensor], where: str) -> None:
        """Take other values.

        Raises:
            CheckpointError: Their names or shapes are not what is needed.
        """
        own = self._own()
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in values.items()}:
            raise CheckpointError(f"{where}: the norms that are kept in it do not belong to this model")
        for key, tensor in own.items():
            tensor.data = values[key].clone()

    def _own(self) -> dict[str, Tensor]:
        found: dict[str, Tensor | None] = {f"{path}.bias": bias for path, bias in self.biases.items()}
        for path, norm in self.norms.items():
            found |= {f"{path}.{name}": t for name, t in (*norm._parameters.items(), *norm._buffers.items())}
        return {key: tensor for key, tensor in found.items() if tensor is not None}


def _kept(norm: nn.Module, memo: dict[int, Any]) -> nn.Module:
    kept = type(norm).__new__(type(norm))
    kept.__dict__.update(norm.__dict__)
    for held in ("_parameters", "_buffers"):
        tensors = norm.__dict__[held]
        kept.__dict__[held] = type(tensors)((n, None if t is None else _copied(t, memo)) for n, t in tensors.items())
    kept.__dict__["_modules"] = norm._modules.copy()
    return kept


def _copied(tensor: Tensor, memo: dict[int, Any]) -> Any:
    """Copy a parameter or a buffer; what two norms share, their copies share."""
    if id(tensor) not in memo:
        made = tensor.detach().clone()
        memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    return memo[id(tensor)]
