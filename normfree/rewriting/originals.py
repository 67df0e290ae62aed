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
        norms = {edit.name: modules[edit.name] for edit in plan.removed}
        return cls(norms, {path: modules[path]._parameters["bias"] for path in plan.pairs})._copied({})

    def __deepcopy__(self, memo: dict[int, Any]) -> Originals:
        copied = self._copied(memo)
        for norm in copied.norms.values():
            norm.__dict__["_modules"] = copy.deepcopy(norm._modules, memo)
        return copied

    def _copied(self, memo: dict[int, Any]) -> Originals:
        """Copy tensors, and nothing else; what two norms share, their copies share."""
        norms = {path: _kept(norm, memo) for path, norm in self.norms.items()}
        return Originals(norms, copy.deepcopy(self.biases, memo))

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
    # A deep copy would take all of the memory that a buffer may be a part of.
    memo |= {id(b): b.detach().clone() for b in norm._buffers.values() if b is not None and id(b) not in memo}
    tensors = {held: copy.deepcopy(norm.__dict__[held], memo) for held in ("_parameters", "_buffers")}
    kept.__dict__.update(norm.__dict__, _modules=norm._modules.copy(), **tensors)
    return kept
