"""Layers that hand out a copy of what their hooks have seen.

A full backward hook makes the output of a layer a view into which autograd lets nobody write: an in-place sum or
activation behind a hooked layer fails (opacus #828). The hooks run inside ``__call__``; the copy is made behind it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from normfree.layers.carriers import ScaledOutput
from normfree.layers.slots import ChannelAffine, SkipInit

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object

__all__ = ["CopiedAffine", "CopiedOutput", "CopiedSkipInit"]


class _Copied(_Module):
    """Mixin: the output may be written to in place, whoever hooks the layer."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return a copy of the output."""
        return super().__call__(*args, **kwargs).clone()


class CopiedSkipInit(_Copied, SkipInit):
    """A SkipInit that hands out copies."""


class CopiedAffine(_Copied, ChannelAffine):
    """A ChannelAffine that hands out copies."""


class CopiedOutput(_Copied, ScaledOutput):
    """Mixin: a ScaledOutput that hands out copies."""
