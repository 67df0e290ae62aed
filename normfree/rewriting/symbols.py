"""What a block's own forward does in its default call, written down without values.

What a run shows holds for the shapes of that run; a forward that is to be called again must hold for all. So this is
the one place where symbols stand for tensors; whether they went the way of the run is for the caller to check.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils import checkpoint

from normfree.errors import UsageError
from normfree.tracing.recorder import is_default

__all__ = ["LostError", "only_default", "own_graph"]

_ONE_AT_A_TIME = threading.RLock()  # torch.fx replaces methods of nn.Module while it follows a forward


def _in_place(do: Any) -> Any:
    return lambda x, y: x.tracer.create_proxy("call_function", do, (x, y), {})


class _Proxy(fx.Proxy):
    """Also knows what ``x += y`` does, which torch.fx would write down as ``x = x + y``.

    It must not pass for a tensor: torch takes what ``isinstance`` calls one for one, and ends the process.
    """

    __iadd__, __isub__, __imul__ = map(_in_place, (operator.iadd, operator.isub, operator.imul))


class LostError(Exception):
    """A forward does what its graph would not tell."""


def _switched() -> tuple[object, ...]:
    """Return what contexts around an operation change about it."""
    kinds = ("cpu", "cuda")
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]
    frames = (frame.f_code.co_filename for frame, _ in traceback.walk_stack(None))
    return torch.is_grad_enabled(), *autocast, checkpoint.__file__ in frames


class _OwnForward(fx.Tracer):
    """Sees what a block's own forward does in its default call; its children are leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.switched = _switched()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002  # its signature is fx's
        """Stop at every child."""
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return a proxy that knows in-place arithmetic."""
        if _switched() != self.switched:
            raise LostError("it computes in a context (no_grad, autocast, checkpoint) that would be lost")
        return _Proxy(node, self)

    # Its signature is fx's.
    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:  # noqa: ARG002
        """Make the default call, and keep the parameters that it leaves out, with a check that nobody gives them."""
        args: list[Any] = []
        for parameter in inspect.signature(self.root.forward).parameters.values():
            if parameter.default is parameter.empty:
                args.append(self.create_proxy("placeholder", parameter.name, (), {}))
            else:
                proxy = self.create_proxy("placeholder", parameter.name, (parameter.default,), {})
                self.create_proxy("call_function", only_default, (proxy, parameter.default, parameter.name), {})
                args.append(parameter.default)
        return lambda: root_fn(self.root, *args), []


def only_default(value: Any, default: Any, name: str) -> None:
    """Refuse an argument that the rewritten forward does not know what to do with.

    Raises:
        UsageError: It is not the default.
    """
    if not is_default(value, default):
        raise UsageError(f"{name} was given to a forward that was rewritten for its default; exclude its sum instead")


def own_graph(block: nn.Module) -> fx.Graph:
    """Return the graph of a forward.

    Raises:
        LostError: The graph would not tell everything.
    """
    with _ONE_AT_A_TIME, torch.enable_grad(), _no_symbols_in_functions():
        return _OwnForward().trace(block)


@contextlib.contextmanager
def _no_symbols_in_functions() -> Iterator[None]:
    """Refuse an autograd function that is given a symbol: of it only its forward would be left."""
    function: Any = torch.autograd.Function
    apply = vars(function)["apply"]

    def tensors_only(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(arg, fx.Proxy) for arg in args):
            raise LostError("it calls an autograd function, whose backward would be lost")
        return apply.__get__(None, cls)(*args, **kwargs)

    function.apply = classmethod(tensors_only)
    try:
        yield
    finally:
        function.apply = apply
