"""What functions, methods and layers do to their input: the tables behind :class:`normfree.analysis.flow.Flow`.

Types of timm and torchvision stand here by qualified name, since neither may be imported for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum, auto

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.padding import _CircularPadNd, _ConstantPadNd, _ReflectionPadNd, _ReplicationPadNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _LPPoolNd, _MaxPoolNd

from normfree.tracing.randomness import in_mode

__all__ = ["Role", "elementwise", "function_role", "makes_constants", "module_role", "name_of", "scales"]


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


_OF_NAMES = {
    Role.ADD: "add sub subtract lerp index_add scatter_add",
    Role.MUL: "mul multiply",
    Role.DIV: "div divide",
    Role.CAT: "cat concat concatenate stack setitem overwritten copy",
    Role.SPLIT: "chunk split unbind tensor_split",
    Role.RESHAPE: "flatten unflatten ravel reshape reshape_as view view_as squeeze unsqueeze contiguous "
    "permute transpose movedim moveaxis swapaxes swapdims",
    Role.PAD: "pad repeat repeat_interleave tile expand expand_as",
    Role.SLICE: "narrow",
    Role.UPSAMPLE: "interpolate",
    Role.PASS: "dropout dropout1d dropout2d dropout3d feature_dropout clone detach alias nan_to_num neg negative "
    "requires_grad as_tensor asarray cpu cuda to type type_as float half double bfloat16",
    Role.CONV: "linear conv1d conv2d conv3d",
    Role.POOL: "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d",
}
_NAMES = {name: role for role, names in _OF_NAMES.items() for name in names.split()}
_OPERATORS = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "truediv": "div"}
_OF_SHAPES = (
    "size dim ndimension numel is_contiguous is_floating_point get_device new_empty new_zeros new_ones new_full "
    "new_tensor empty_like zeros_like ones_like full_like rand_like randn_like zero"
)
_WITHOUT_DATA = frozenset(_OF_SHAPES.split())
_MODULES: dict[Role, tuple[type[nn.Module], ...]] = {
    Role.CONV: (nn.modules.conv._ConvNd, nn.Linear),
    Role.PASS: (nn.Identity, nn.modules.dropout._DropoutNd),
    Role.RESHAPE: (nn.Flatten, nn.Unflatten),
    Role.POOL: (_AvgPoolNd, _MaxPoolNd, _LPPoolNd, _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd),
    Role.PAD: (_ConstantPadNd, _ReflectionPadNd, _ReplicationPadNd, _CircularPadNd),
    Role.UPSAMPLE: (nn.Upsample, nn.PixelShuffle),
}
# By qualified name, since these libraries must not be imported for it.
_MODULE_NAMES: dict[str, Role] = {
    "timm.layers.drop.DropPath": Role.PASS,
    "torchvision.ops.stochastic_depth.StochasticDepth": Role.PASS,
    "timm.layers.blur_pool.BlurPool2d": Role.POOL,
}


def name_of(node: fx.Node) -> str:
    """Return the name of the function, method, operator or attribute that a node stands for.

    ``x += y``, ``x.add_(y)`` and ``torch.ops.aten.add.Tensor(x, y)`` are called ``add``, as ``x + y`` is.
    """
    if node.target is getattr:
        return str(node.args[1])
    name = str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", ""))
    name = name.partition(".")[0].rstrip("_")
    return _OPERATORS.get(name, name)


def function_role(node: fx.Node) -> Role:
    """Return what a ``call_function`` or ``call_method`` node does."""
    if node.target is getattr:
        return Role.PASS if name_of(node) == "data" else Role.RESHAPE if name_of(node) in ("T", "mT") else Role.OTHER
    return _NAMES.get(name_of(node), Role.OTHER)


def makes_constants(node: fx.Node) -> bool:
    """Whether a node uses nothing but the shape of its input: ``zeros_like(x)``, ``x.new_empty(2)``, ``x * 0``."""
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target is getattr:
        return name_of(node) not in ("T", "mT", "H", "mH", "data", "real", "imag")
    zero = any(isinstance(arg, (int, float)) and arg == 0 for arg in node.args)
    filled = name_of(node) in _WITHOUT_DATA or node.target == "bernoulli_"  # torch.bernoulli(x) draws by x
    return filled or (function_role(node) is Role.MUL and zero)


def module_role(module: nn.Module) -> Role:
    """Return what a layer does."""
    if isinstance(module, nn.Sequential) and len(module) == 0:
        return Role.PASS
    if isinstance(module, (nn.AlphaDropout, nn.FeatureAlphaDropout)):
        return Role.OTHER  # it puts another number in the place of what it drops, whatever the scale
    for role, kinds in _MODULES.items():
        if isinstance(module, kinds):
            return role
    cls = type(module)
    return _MODULE_NAMES.get(f"{cls.__module__}.{cls.__qualname__}", Role.OTHER)


def elementwise(function: Callable[[Tensor], Tensor]) -> bool:
    """Whether a function works entry by entry.

    Told by what it does: shuffling the entries must shuffle the result. Pools, softmax and filters fail. A module of
    the user's own may do something else in the other mode: both must pass. torch's own differ in noise only.
    """
    if not isinstance(function, nn.Module):
        return _is_elementwise(function)
    own = not type(function).__module__.startswith("torch.nn")
    with in_mode(function, function.training):
        return all(_is_elementwise(function.train(mode)) for mode in ((False, True) if own else (False,)))


def _is_elementwise(function: Callable[[Tensor], Tensor]) -> bool:
    """Probe at two shapes: at one alone, what resizes to just that shape would pass for the identity."""
    return all(_shuffles(function, shape) for shape in ((2, 3, 4, 4), (3, 4, 5, 7)))


def _shuffles(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> bool:
    count = math.prod(shape)
    x = torch.linspace(-3.0, 3.0, count).reshape(shape)
    # 29 has no factor in common with the count, so this visits every entry once and keeps none in its row or channel.
    order = torch.arange(count) * 29 % count
    try:
        with torch.no_grad():
            result, shuffled = function(x.clone()), function(x.flatten()[order].reshape(x.shape))
    except Exception:  # not a function of one tensor of this shape, whatever it raises
        return False
    same = isinstance(result, Tensor) and isinstance(shuffled, Tensor) and result.shape == x.shape
    # Vectorised loops round the same entry differently at different places.
    return same and torch.allclose(result.flatten()[order], shuffled.flatten(), atol=1e-6)


def scales(function: Callable[[Tensor], Tensor]) -> bool:
    """Whether a function that works entry by entry multiplies by one and the same number: an identity, a quantiser."""
    x = torch.linspace(-3.0, 3.0, 25).reshape(1, 1, 5, 5)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            y = function(x.clone())
    except Exception:  # as above
        return False
    return bool(torch.allclose(y, x * (y.flatten()[-1] / 3), atol=1e-6))
