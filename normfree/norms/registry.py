"""The registry of norm types, keyed by type or by the qualified name of a type in a library we must not import."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Norm", "describe", "find_norms", "is_norm", "like_torchs", "looks_like_norm", "register_norm"]


@dataclass(frozen=True)
class Norm:
    """What one norm instance is, free of its library: ``act(drop(weight * (x - mean) / sqrt(var + eps) + bias))``.

    Attributes:
        features: Number of channels ``C``; every tensor here has shape ``(C,)``.
        mean: Running mean, or ``None`` if none is tracked.
        var: Running (biased) variance, or ``None`` if none is tracked.
        weight: The affine scale, or ``None`` for ones.
        bias: The affine shift, or ``None`` for zeros.
        eps: Added to the variance.
        drop: Dropout applied after the affine, if the type brings one.
        act: Activation applied last, if the type brings one.
        frozen: The type never uses batch statistics.
        problem: Why an instance cannot be converted as it stands, for example a lazy one that never ran.

    Example:
        >>> import normfree, torch
        >>> ones, zeros = torch.ones(2), torch.zeros(2)
        >>> norm = normfree.Norm(2, mean=zeros, var=4 * ones, weight=ones, bias=None, eps=0.0)
        >>> norm.affine()[0].tolist()
        [0.5, 0.5]
    """

    features: int
    mean: Tensor | None
    var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    drop: nn.Module | None = None
    act: nn.Module | None = None
    frozen: bool = False
    problem: str | None = None

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return ``(gain, shift)`` of shape ``(C,)`` in float64 with ``norm(x) == gain * x + shift`` in eval mode.

        ``gain = weight / sqrt(var + eps)`` and ``shift = bias - gain * mean`` (Ioffe & Szegedy 2015, algorithm 2).

        Raises:
            ValueError: No statistics are tracked.
        """
        if self.mean is None or self.var is None:
            raise ValueError("no running statistics")
        gain = (self.var.detach().double() + self.eps).rsqrt()
        if self.weight is not None:
            gain = gain * self.weight.detach().double()
        shift = -gain * self.mean.detach().double()
        if self.bias is not None:
            shift = shift + self.bias.detach().double()
        return gain, shift

    def trained(self) -> bool | None:
        """Whether it has been trained; ``None`` where nothing about it tells.

        It has if its statistics or its shift have moved from where construction puts them, or if it is frozen. It has
        not if a shift that learns is still zero, or if its statistics are where they were and so is its scale.
        """
        if self.frozen:
            return True
        starts = ((self.mean, 0), (self.var, 1), (self.bias, 0))
        fresh = [(tensor, start) for tensor, start in starts if tensor is not None]
        if any(tensor.is_meta for tensor, _ in fresh):
            return False
        if any(bool((tensor != start).any()) for tensor, start in fresh):
            return True
        if self.bias is not None and self.bias.requires_grad:
            return False
        flat = self.weight is None or bool((self.weight == self.weight[0]).all())
        return False if flat and self.mean is not None else None


def like_torchs(module: Any, **more: Any) -> Norm:
    """Describe a module that calls its statistics and its affine what torch calls them; add what it has besides."""
    return Norm(
        features=module.num_features if hasattr(module, "num_features") else module.running_mean.numel(),
        mean=module.running_mean,
        var=module.running_var,
        weight=module.weight,
        bias=module.bias,
        eps=getattr(module, "eps", 1e-5),  # transformers' frozen ones have the number in their forward
        **more,
    )


Describe = Callable[[nn.Module], Norm]
_KNOWN: dict[type[nn.Module] | str, Describe] = {}


def register_norm(*kinds: type[nn.Module] | str) -> Callable[[Describe], Describe]:
    """Teach normfree a norm type: decorate the function that describes an instance.

    Args:
        kinds: Types, or qualified names of types (``"package.module.Class"``, or a shell pattern of such names) that
            should not be imported for this.

    Raises:
        ValueError: One of them is registered already.

    Example:
        >>> import torch, normfree
        >>> class MyNorm(torch.nn.BatchNorm2d):
        ...     def forward(self, x):
        ...         return super().forward(x) * 2
        >>> @normfree.register_norm(MyNorm)
        ... def describe(norm):
        ...     return normfree.Norm(
        ...         norm.num_features, norm.running_mean, norm.running_var, norm.weight * 2, norm.bias * 2, norm.eps
        ...     )
    """

    def decorate(function: Describe) -> Describe:
        for kind in kinds:
            if kind in _KNOWN:
                raise ValueError(f"{kind!r} is registered already")
        _KNOWN.update(dict.fromkeys(kinds, function))
        _of_type.cache_clear()
        return function

    return decorate


def _find(module: nn.Module) -> Describe | None:
    """Return the handler for a module's type, or a parent's if the module computes exactly what the parent does."""
    if "forward" in module.__dict__:  # patched on the instance: it computes something else
        return None
    return _of_type(type(module))  # type: ignore[arg-type]  # typeshed takes a metaclass for unhashable


@functools.lru_cache(maxsize=4096)
def _of_type(cls: type[nn.Module]) -> Describe | None:
    for parent in cls.__mro__:
        name = f"{parent.__module__}.{parent.__qualname__}"
        patterns = (kind for kind in _KNOWN if isinstance(kind, str) and fnmatchcase(name, kind))
        found = _KNOWN.get(parent) or _KNOWN.get(name) or _KNOWN.get(next(patterns, ""))
        if found is not None:
            return found if cls.forward is getattr(parent, "forward", None) else None
    return None


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a norm this package can remove."""
    return _find(module) is not None


def describe(module: nn.Module) -> Norm:
    """Return the description of a norm for which :func:`is_norm` holds."""
    found = _find(module)
    if found is None:
        raise ValueError(f"{type(module).__qualname__} is not a registered norm")
    return found(module)


def find_norms(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the first name of every norm with its further names."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_norm(module):
            found.setdefault(id(module), []).append(name)
    return {name: tuple(more) for name, *more in found.values()}


def looks_like_norm(module: nn.Module) -> Literal["subclass", "statistics"] | None:
    """Say why an unregistered module is suspected to be batch normalisation, or ``None`` if it is not.

    Either it is an unknown subclass with a forward of its own, or it holds running statistics of its own.
    """
    if is_norm(module) or isinstance(module, torch.jit.ScriptModule):
        return None
    if isinstance(module, _BatchNorm):
        return "subclass"
    tracks = isinstance(module._buffers.get("running_mean"), Tensor)
    return "statistics" if tracks and not isinstance(module, nn.modules.instancenorm._InstanceNorm) else None
