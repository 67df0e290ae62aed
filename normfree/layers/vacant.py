"""What stands where a norm was, and tells so whoever reads the norm that it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object

__all__ = ["OfNorm", "Vacant"]


class OfNorm(_Module):
    """Mixin for what stands where a norm was: it says what to do to whoever reads the norm that it was.

    Who asks politely (``hasattr``, ``getattr`` with a default) is answered as by any other module.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name not in _OF_NORMS:
                raise
            raise AttributeError(
                f"normfree has converted the norm that had this {name!r}; what merges branches or reads norms wants "
                "normfree.fuse(model) first, which merges them"
            ) from error


_OF_NORMS = ("weight", "bias", "running_mean", "running_var", "eps", "num_features", "momentum", "affine")


class Vacant(OfNorm, nn.Identity):
    """Stands where a norm was of which nothing is left here."""

    __module__ = nn.Identity.__module__  # torch.fx looks there for what it takes as a whole, as feature extractors do

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _vacant, (), self.__dict__  # pickle looks there too


def _vacant() -> Vacant:
    return Vacant.__new__(Vacant)
