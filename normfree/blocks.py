"""Blocks whose forward is rewritten: the last resort where a branch ends in something no module owns.

A product or a concatenation written inline leaves no module that alpha could live in. Then the one block that owns the
sum gets a forward generated from its own graph, in which the branch passes through a SkipInit module before it is
added. The block stays the same object with the same children and is still an ``isinstance`` of its class.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, cast

from torch import Tensor, fx, nn

from normfree.copying import meta_copy
from normfree.graph import Flow, Role
from normfree.layers import ScaledSum, skipinit_name
from normfree.tracer import Tracer
from normfree.traces import MODES, Graph

__all__ = ["scaled_block_class", "why_not_scalable"]


Places = tuple[tuple[int, int], ...]


class _OwnForward(Tracer):
    """Sees what a block's own forward does; its children are leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002  # its signature is fx's
        """Stop at every child."""
        return True


def why_not_scalable(block: nn.Module, addition: int, operand: int) -> str | None:
    """Say why the forward of ``block`` cannot be rewritten, or return ``None`` if it can.

    Args:
        block: The module whose own forward adds; it should be on the meta device.
        addition: Which of its additions of two activations.
        operand: Which operand of that is the branch.
    """
    if "forward" in block.__dict__ or hasattr(block, skipinit_name(addition)):
        return f"its forward is patched, or it has an attribute {skipinit_name(addition)} of its own"
    parameters = list(inspect.signature(block.forward).parameters.values())
    if any(p.default is not p.empty or p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return "its forward takes optional arguments"
    try:
        scaled_block_class(block, ((addition, operand),))
    except Exception as error:  # whatever the block's forward raises when it meets a proxy
        return f"its own forward cannot be traced ({type(error).__name__})"
    return None


def scaled_block_class(block: nn.Module, places: Places) -> type[nn.Module]:
    """Return the class that ``block`` becomes.

    Its forward passes operands of its additions, each given as ``(addition, operand)``, through the :class:`SkipInit`
    that it holds as :func:`skipinit_name` says.
    """
    original = type(block)
    evaluate, train = _forwards(meta_copy(block), places)
    members = {
        "__module__": original.__module__,
        "_places": places,
        "_evaluate": evaluate,
        "_train": train,
        "forward": _forward,
        "__reduce_ex__": _reduce,
        "__deepcopy__": _deepcopy,
    }
    return type(f"Scaled{original.__name__}", (ScaledSum, original), members)


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self._train(*args, **kwargs) if self.training else self._evaluate(*args, **kwargs)


def _reduce(self: Any, _: Any) -> tuple[Any, ...]:
    # The class is made at run time: pickle rebuilds it from the original class and from what the block holds.
    return _rebuild, (type(self).__mro__[2], self._places, self.__dict__)


def _rebuild(original: Any, places: Places, state: dict[str, Any]) -> nn.Module:
    block = cast(nn.Module, object.__new__(original))
    block.__dict__.update(state)
    held = {name: block._modules.pop(name) for name in (skipinit_name(addition) for addition, _ in places)}
    block.__class__ = scaled_block_class(block, places)
    block._modules.update(held)
    return block


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    new = type(self).__new__(type(self))
    memo[id(self)] = new
    new.__dict__.update(copy.deepcopy(self.__dict__, memo))
    return new


def _forwards(block: nn.Module, places: Places) -> tuple[Any, ...]:
    """Return the forward of each mode as a function of ``self`` and the block's arguments."""
    training = block.training
    try:
        return tuple(_generate(block.train(mode == "train"), places) for mode in MODES)
    finally:
        block.train(training)


def _generate(block: nn.Module, places: Places) -> Any:
    tracer = _OwnForward(layers={id(module): True for module in block.modules()})
    graph = tracer.trace(block)
    flow = Flow(Graph(graph, tracer.owners, {}, tracer.calls), dict(block.named_modules(remove_duplicate=False)), ())
    held = {str(n.target).split(".")[0] for n in graph.nodes if n.op == "get_attr"}
    if not all(isinstance(getattr(block, name, None), (Tensor, nn.Module)) for name in held) or any(
        name.startswith("_tensor_constant") for name in held
    ):
        raise TypeError("the forward makes tensors of its own")
    additions = [n for n in flow.nodes if flow.roles[n] is Role.ADD]
    for addition, operand in places:
        node = additions[addition]
        branch = node.args[operand]
        if not isinstance(branch, fx.Node):
            raise TypeError("the operand is a constant")
        with graph.inserting_before(node):
            scaled = graph.create_node("call_module", skipinit_name(addition), (branch,))
        node.args = tuple(scaled if i == operand else arg for i, arg in enumerate(node.args))
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, f"<{type(block).__qualname__} with alpha>", "exec"), scope)  # noqa: S102  # our own graph
    return scope["forward"]
