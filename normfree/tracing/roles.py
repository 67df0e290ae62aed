"""What functions, methods and layers do to their input: the tables behind :class:`normfree.analysis.flow.Flow`.

Types of timm and torchvision stand here by qualified name, since neither may be imported for it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from enum import Enum, auto
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

__all__ = ["VIEWS", "Role", "elementwise", "function_role", "is_shape", "method_role", "module_role"]


class Role(Enum):
    """What a node does to its (first) data input."""

    NORM = auto()
    CONV = auto()  # convolution or linear of any kind
    PASS = auto()  # identity, dropout, stochastic depth: commutes with a scalar, keeps zero zero
    RESHAPE = auto()
    POOL = auto()
    PAD = auto()
    UPSAMPLE = auto()
    SLICE = auto()
    SPLIT = auto()
    ADD = auto()
    MUL = auto()
    DIV = auto()
    CAT = auto()
    INPUT = auto()
    OTHER = auto()  # activations, and everything unknown


_FUNCTIONS: dict[Callable[..., Any], Role] = {
    operator.add: Role.ADD,
    operator.iadd: Role.ADD,
    torch.add: Role.ADD,
    operator.mul: Role.MUL,
    operator.imul: Role.MUL,
    torch.mul: Role.MUL,
    operator.truediv: Role.DIV,
    operator.itruediv: Role.DIV,
    torch.div: Role.DIV,
    torch.cat: Role.CAT,
    torch.concat: Role.CAT,
    torch.chunk: Role.SPLIT,
    torch.split: Role.SPLIT,
    torch.unbind: Role.SPLIT,
    torch.flatten: Role.RESHAPE,
    torch.reshape: Role.RESHAPE,
    torch.permute: Role.RESHAPE,
    torch.transpose: Role.RESHAPE,
    torch.squeeze: Role.RESHAPE,
    torch.unsqueeze: Role.RESHAPE,
    F.pad: Role.PAD,
    F.interpolate: Role.UPSAMPLE,
    F.dropout: Role.PASS,
    F.dropout1d: Role.PASS,
    F.dropout2d: Role.PASS,
    F.dropout3d: Role.PASS,
    torch.dropout: Role.PASS,
    F.linear: Role.CONV,
    F.conv1d: Role.CONV,
    F.conv2d: Role.CONV,
    F.conv3d: Role.CONV,
}
_FUNCTION_NAMES: dict[str, Role] = {
    "stochastic_depth": Role.PASS,
    "drop_path": Role.PASS,
    **{f"{kind}_pool{dims}d": Role.POOL for kind in ("avg", "max") for dims in (1, 2, 3)},
    **{f"adaptive_{kind}_pool{dims}d": Role.POOL for kind in ("avg", "max") for dims in (1, 2, 3)},
}
_METHODS: dict[str, Role] = {
    "add": Role.ADD,
    "add_": Role.ADD,
    "mul": Role.MUL,
    "mul_": Role.MUL,
    "div": Role.DIV,
    "div_": Role.DIV,
    "chunk": Role.SPLIT,
    "split": Role.SPLIT,
    "unbind": Role.SPLIT,
    **dict.fromkeys(
        ("flatten", "reshape", "view", "permute", "transpose", "contiguous", "squeeze", "unsqueeze", "reshape_as"),
        Role.RESHAPE,
    ),
    "view_as": Role.RESHAPE,
}
_MODULES: tuple[tuple[tuple[type[nn.Module], ...], Role], ...] = (
    ((nn.modules.conv._ConvNd, nn.Linear), Role.CONV),
    ((nn.Identity, nn.modules.dropout._DropoutNd), Role.PASS),
    ((nn.Flatten, nn.Unflatten), Role.RESHAPE),
    ((nn.modules.pooling._AvgPoolNd, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._LPPoolNd), Role.POOL),
    ((nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd), Role.POOL),
    (
        (
            nn.modules.padding._ConstantPadNd,
            nn.modules.padding._ReflectionPadNd,
            nn.modules.padding._ReplicationPadNd,
            nn.modules.padding._CircularPadNd,
        ),
        Role.PAD,
    ),
    ((nn.Upsample, nn.PixelShuffle), Role.UPSAMPLE),
)
# By qualified name, since these libraries must not be imported for it.
_MODULE_NAMES: dict[str, Role] = {
    "timm.layers.drop.DropPath": Role.PASS,
    "torchvision.ops.stochastic_depth.StochasticDepth": Role.PASS,
    "timm.layers.blur_pool.BlurPool2d": Role.POOL,
}


def function_role(node: fx.Node) -> Role:
    """Return what a ``call_function`` node does."""
    return _FUNCTIONS.get(cast(Any, node.target)) or _FUNCTION_NAMES.get(
        getattr(node.target, "__name__", ""), Role.OTHER
    )


def method_role(node: fx.Node) -> Role:
    """Return what a ``call_method`` node does."""
    return _METHODS.get(str(node.target), Role.OTHER)


def is_shape(node: fx.Node) -> bool:
    """Whether a node tells the shape, the type or the place of its input, or uses nothing else of it."""
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS or node.target in _NEW
    if getattr(node.target, "__name__", "") in _LIKE:
        return True
    return node.op == "call_function" and node.target is getattr and node.args[1] not in ("T", "mT", "real", "data")


def module_role(module: nn.Module) -> Role:
    """Return what a layer does."""
    if isinstance(module, nn.Sequential) and len(module) == 0:
        return Role.PASS
    for kinds, role in _MODULES:
        if isinstance(module, kinds):
            return role
    cls = type(module)
    return _MODULE_NAMES.get(f"{cls.__module__}.{cls.__qualname__}", Role.OTHER)


_SHAPE_METHODS = {"size", "dim", "ndimension", "numel", "stride", "is_contiguous", "is_floating_point", "get_device"}
_NEW = {"new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"}
_LIKE = {"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"}
# Further methods whose result may share memory with the tensor they are called on.
VIEWS = {
    "narrow",
    "select",
    "expand",
    "expand_as",
    "unfold",
    "diagonal",
    "detach",
    "swapaxes",
    "movedim",
    "t",
    "as_strided",
}


Effect = Literal["pure", "in place"] | None


def elementwise(function: Callable[[Tensor], Tensor]) -> Effect:
    """Say whether a function works entry by entry, and whether it writes into its input; ``None`` if it does not.

    Told by what it does: shuffling the entries must shuffle the result. Pools, softmax and filters fail. A module of
    the user's own may do something else in the other mode: both must agree. torch's own differ in noise only.
    """
    if not isinstance(function, nn.Module):
        return _probe(function)
    own = not type(function).__module__.startswith("torch.nn")
    before = function.training
    try:
        found = {_probe(function.train(mode)) for mode in ((False, True) if own else (False,))}
    finally:
        function.train(before)
    return found.pop() if len(found) == 1 else None


def _probe(function: Callable[[Tensor], Tensor]) -> Effect:
    """Probe at two shapes: at one alone, what resizes to just that shape would pass for the identity."""
    found = _probe_at(function, (2, 3, 4, 4))
    return found if found is not None and found == _probe_at(function, (3, 4, 5, 7)) else None


def _probe_at(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Effect:
    count = math.prod(shape)
    x = torch.linspace(-3.0, 3.0, count).reshape(shape)
    # 29 has no factor in common with the count, so this visits every entry once and keeps none in its row or channel.
    order = torch.arange(count) * 29 % count
    given = x.clone()
    try:
        with torch.no_grad():
            result, shuffled = function(given), function(x.flatten()[order].reshape(x.shape))
    except Exception:  # not a function of one tensor of this shape, whatever it raises
        return None
    same = isinstance(result, Tensor) and isinstance(shuffled, Tensor) and result.shape == x.shape
    # Vectorised loops round the same entry differently at different places.
    if not same or not torch.allclose(result.flatten()[order], shuffled.flatten(), atol=1e-6):
        return None
    return "pure" if torch.equal(given, x) else "in place"
