"""Describe: a module comes in, what it computes as a norm goes out, or nothing; a file for each library.

A new type is one decorated function that describes an instance: :func:`register_norm`. Nothing else changes.
"""

from __future__ import annotations

from normfree.norms import timm as _timm
from normfree.norms import torch as _torch
from normfree.norms import torchvision as _torchvision
from normfree.norms.registry import Norm, describe, find_norms, is_norm, looks_like_norm, register_norm

__all__ = ["Norm", "describe", "find_norms", "is_norm", "looks_like_norm", "register_norm"]

del _timm, _torch, _torchvision  # imported for their registrations
