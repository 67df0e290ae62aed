"""Layers that hand out a copy of what their hooks have seen.

A full backward hook makes the output of a layer a view into which autograd lets nobody write: an in-place sum or
activation behind a hooked layer fails (opacus #828). The hooks run inside ``__call__``; the copy is made behind it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from normfree.layers.carriers import ScaledOutput
from normfree.layers.slots import ChannelAffine, SkipInit

__all__ = ["CopiedAffine", "CopiedOutput", "CopiedSkipInit"]


class CopiedSkipInit(SkipInit):
    """A SkipInit whose output may be written to in place, whoever hooks it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return a copy of the output."""
        return nn.Module.__call__(self, *args, **kwargs).clone()


class CopiedAffine(ChannelAffine):
    """A ChannelAffine whose output may be written to in place, whoever hooks it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return a copy of the output."""
        return nn.Module.__call__(self, *args, **kwargs).clone()


class CopiedOutput(ScaledOutput):
    """Mixin: a ScaledOutput whose output may be written to in place, whoever hooks it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return a copy of the output."""
        return super().__call__(*args, **kwargs).clone()  # type: ignore[misc]  # the class beside this one is a module
