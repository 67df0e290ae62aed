"""What layers hold besides weights: constants that are no buffers, and a scalar that is read as alpha."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object

__all__ = ["CONSTANTS", "HasAlpha", "HasConstants", "alpha_of"]

CONSTANTS = ("gain", "center", "at_center", "filter_mean", "fixed_bias")
"""The tensors among a carrier's constants; see :class:`normfree.layers.Constants`."""


@overload
def alpha_of(raw: Tensor, unit: float) -> Tensor: ...
@overload
def alpha_of(raw: Tensor | None, unit: float) -> Tensor | None: ...
def alpha_of(raw: Tensor | None, unit: float) -> Tensor | None:
    """Return alpha, ``(1,)``, differentiably: what is learnt over its unit."""
    return raw if raw is None or unit == 1.0 else raw / unit


class HasConstants(_Module):
    """Constants that a module computes with: moved, saved and loaded with it, and no buffers.

    Buffers would be broadcast in every forward pass of DDP, averaged as if they were statistics, and refused by Opacus.
    A name that holds a parameter instead is left to torch.
    """

    def _held(self) -> dict[str, Tensor]:
        values = {name: self.__dict__.get(name) for name in CONSTANTS}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """List the constants too for who asks one module after another, as FSDP2 and distributed checkpoints do.

        They move and broadcast what they find so. DDP and Opacus ask the model as a whole.
        """
        yield from super().named_buffers(prefix, recurse, remove_duplicate)
        if not recurse:
            yield from ((f"{prefix}.{name}" if prefix else name, value) for name, value in self._held().items())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
        moved = {name: fn(value) for name, value in self._held().items()}
        # Nothing else knows these values: a copy without memory has them too. Opacus calls one with real parameters.
        self.__dict__.update({name: value for name, value in moved.items() if not value.is_meta})
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: value for name, value in self._held().items()})

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, strict: bool, *lists: list[str]) -> None:
        super()._load_from_state_dict(state, prefix, metadata, strict, *lists)
        missing, unexpected, errors = lists
        for name, value in self._held().items():
            key = prefix + name
            if key in unexpected:
                unexpected.remove(key)
            found = state.get(key)
            if found is None:
                missing += [key] if strict else []
            elif found.shape != value.shape:
                errors.append(f"size mismatch for {key}: {tuple(found.shape)} where the model has {tuple(value.shape)}")
            else:
                value.copy_(found)


class HasAlpha(_Module):
    """What a SkipInit scalar is stored in, and read from.

    Attributes:
        raw_alpha: What is learnt, ``(1,)``: alpha times :attr:`alpha_unit`; ``None`` without alpha.
        alpha_unit: A constant: 1, or larger where alpha is to learn in smaller steps than the weights.
    """

    __jit_unused_properties__ = ("alpha", "base_layer")
    if TYPE_CHECKING:  # TorchScript reads what a class announces, and knows no parameter that may be missing
        raw_alpha: nn.Parameter | None
        alpha_unit: float

    @property
    def alpha(self) -> float | None:
        """The SkipInit scalar as a number; assign one to change it. What learns is ``raw_alpha``."""
        raw = self._parameters["raw_alpha"]
        return None if raw is None else float(raw.detach()) / self.alpha_unit

    @alpha.setter
    def alpha(self, value: float) -> None:
        raw = self._parameters["raw_alpha"]
        if raw is None:
            raise AttributeError(f"this {type(self).__name__} carries no alpha")
        with torch.no_grad():
            raw.fill_(value * self.alpha_unit)
