"""What stands for a tensor during a trace, and what is known of it: its Python type, and how many parts it has.

A forward asks more of a tensor than torch.fx answers: whether it is one, and how many pieces a split returns. Both
follow from the graph so far, without any shape.
"""

from __future__ import annotations

import dis
import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from normfree.tracing.roles import Role, module_role

__all__ = ["Proxy", "Types", "known_length"]


class _Unpacked(fx.Proxy):
    """``a, b = proxy`` asks the one instruction that unpacks for its count; a loop asks the call that split.

    torch.fx disassembles the whole function for the first, which is half of the time that tracing an attention layer
    takes, and refuses the second.
    """

    def __iter__(self) -> Iterator[fx.Proxy]:
        frame = inspect.currentframe()
        caller = None if frame is None else frame.f_back
        count = known_length(self.node)
        if caller is not None:
            code, at = caller.f_code.co_code, caller.f_lasti
            if code[at] == dis.opmap["UNPACK_SEQUENCE"]:
                count = code[at + 1]
        if count is None:
            return iter(self.tracer.iter(self))
        return (operator.getitem(cast(Any, self), i) for i in range(count))

    def __len__(self) -> int:
        count = known_length(self.node)
        return super().__len__() if count is None else count


class _Attribute(_Unpacked, fx.proxy.Attribute):
    """``x.shape``, which may be unpacked too."""


class Proxy(_Unpacked):
    """Also records what ``x += y`` does: torch.fx itself would write it down as ``x = x + y``."""

    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


def known_length(node: fx.Node) -> int | None:
    """Return how many parts a node has, if the call that makes them says so: ``x.chunk(2, 1)``, ``x.split([4, 8])``.

    A chunk of a dimension that is too short returns fewer; a loop over it then runs over the first of them.
    """
    name = _name(node)
    if name not in _COUNTED:
        return None
    given = node.args[1] if len(node.args) > 1 else next((node.kwargs[k] for k in _COUNTS if k in node.kwargs), None)
    if isinstance(given, (list, tuple)):
        return len(given) + (name == "tensor_split")
    # An integer tells ``split`` how large the parts are, and the others how many there are.
    return given if isinstance(given, int) and name != "split" else None


class Types:
    """Tells the Python type of what a node of a graph computes, as far as the graph tells it.

    Args:
        root: The module that is traced.
        sites: Paths in it that are norms, or that have taken their place.
        inside: Tells what a module returns of which neither its class nor its role does.
        inputs: Tells the type of an argument by its name.
    """

    def __init__(
        self,
        root: nn.Module,
        sites: frozenset[str],
        inside: Callable[[fx.Node], type | None],
        inputs: Callable[[str], type | None],
    ) -> None:
        self.root = root
        self.sites = sites
        self.inside = inside
        self.inputs = inputs
        self.known: dict[fx.Node, type | None] = {}

    def of(self, node: fx.Node) -> type | None:
        """Return the type, or ``None`` if it is not known."""
        if node not in self.known:
            self.known[node] = self._find(node)
        return self.known[node]

    def _find(self, node: fx.Node) -> type | None:
        if node.op == "placeholder":
            return self.inputs(str(node.target))
        if node.op == "get_attr":
            return Tensor
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            return Tensor if str(node.target) in self.sites or _returns_a_tensor(module) else self.inside(node)
        source = next((self.of(a) for a in node.args[:1] if isinstance(a, fx.Node)), None)
        if node.target is operator.getitem:
            return _item_type(source, node.args[1])
        if node.target is getattr:
            return _ATTRIBUTES.get(str(node.args[1])) if source is Tensor else None
        if node.op == "call_method" and source is not Tensor:
            return None
        name, only = _name(node), len(node.args) + len(node.kwargs) == 1
        if name in _SEVERAL:
            return tuple
        if name in _SEVERAL_OR_ONE:
            return Tensor if only else None
        if name in _NUMBERS:
            return torch.Size if name == "size" and only else int
        kinds = {self.of(argument) for argument in node.all_input_nodes}
        return Tensor if Tensor in kinds and _is_torchs(node) else int if kinds == {int} else None


def _name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    return str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""


def _item_type(source: type | None, index: object) -> type | None:
    if source is torch.Size:
        return torch.Size if isinstance(index, slice) else int
    if source is tuple:
        return tuple if isinstance(index, slice) else Tensor
    return source


def _returns_a_tensor(module: nn.Module) -> bool:
    if module_role(module) is not Role.OTHER:
        return not getattr(module, "return_indices", False)
    torchs = type(module).__module__.startswith("torch.nn")
    return torchs and not isinstance(module, (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Sequential))


def _is_torchs(node: fx.Node) -> bool:
    module = str(getattr(node.target, "__module__", None) or "torch")
    return node.op == "call_method" or module.partition(".")[0] in ("torch", "_operator")


_ATTRIBUTES: dict[str, type] = {"shape": torch.Size, "ndim": int, "dtype": torch.dtype, "device": torch.device}
_ATTRIBUTES |= dict.fromkeys(("T", "mT", "H", "mH", "data", "real", "imag"), Tensor)
_ATTRIBUTES |= dict.fromkeys(("requires_grad", "is_cuda", "is_meta"), bool)
_COUNTED = {"chunk", "split", "tensor_split"}
_COUNTS = ("chunks", "split_size", "split_size_or_sections", "sections", "indices", "indices_or_sections")
_NUMBERS = {"size", "dim", "ndimension", "numel", "nelement"}
_SEVERAL = {*_COUNTED, "unbind", "hsplit", "vsplit", "dsplit", "split_with_sizes", "topk", "sort", "kthvalue", "unique"}
_SEVERAL |= {"cummax", "cummin", "aminmax", "std_mean", "var_mean", "meshgrid", "max_pool2d_with_indices"}
_SEVERAL_OR_ONE = {"max", "min", "median", "mode"}
