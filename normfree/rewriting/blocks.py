"""Blocks whose forward is rewritten: the last resort where a branch ends in something no module owns.

A product or a concatenation written inline leaves no module that alpha could live in. Then the one block that owns the
sum gets a forward generated from its own graph, in which the branch passes through a SkipInit module before it is
added. Optional arguments and what its code reads of the block (a mode, a flag) have in it the values of that time,
and whoever gives another is told so. The block stays the
same object with the same children and is still an ``isinstance`` of its class.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, cast

from torch import Tensor, fx, nn

from normfree.analysis.flow import Flow
from normfree.code.settings import Setting, asks_the_process, settings_of
from normfree.errors import UsageError
from normfree.layers import ScaledSum, skipinit_name
from normfree.rewriting.rows import text_with
from normfree.rewriting.symbols import LostError, own_graph
from normfree.tracing.copying import meta_copy
from normfree.tracing.recorder import optional_arguments
from normfree.tracing.roles import name_of
from normfree.tracing.traces import Graph

__all__ = ["operations_of", "scaled_block_class", "why_not_scalable"]


Places = tuple[tuple[int, int], ...]


def why_not_scalable(block: nn.Module, addition: int, operand: int, done: list[str], writes: bool) -> str | None:
    """Say why the forward of ``block`` cannot be rewritten, or return ``None`` if it can.

    Args:
        block: The module whose own forward adds; it should be on the meta device.
        addition: Which of its additions of two activations.
        operand: Which operand of that is the branch.
        done: What its forward did in a run: see :func:`operations_of`.
        writes: Whether the addition writes its result over the branch.
    """
    if "forward" in block.__dict__ or hasattr(block, skipinit_name(addition)):
        return f"its forward is patched, or it has an attribute {skipinit_name(addition)} of its own"
    parameters = list(inspect.signature(block.forward).parameters.values())
    if any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters):
        return "its forward takes arguments by keyword only, or any number of them"
    if not all(isinstance(default, (int, float, str, type(None))) for default in optional_arguments(block).values()):
        return "its forward takes optional arguments whose defaults cannot be written down"
    asked = asks_the_process(block)
    if asked:
        return f"it goes by what {asked}() says, which may change"
    try:
        copied = meta_copy(block)
        graphs = [own_graph(copied.train(training)) for training in (False, True)]
        if not any(operations_of(_flow(block, graph), "") == done for graph in graphs):
            return "it looks at what it is given, and a forward must hold for whatever that is"
        if writes and not all(_only_its_result_goes_on(block, graph, addition) for graph in graphs):
            return "it adds in place, and goes on with another name of what it has added to"
        for graph in graphs:
            _scale(copied, graph, ((addition, operand),))
            _compiled(type(copied), graph)
    except LostError as error:
        return str(error)
    except Exception as error:  # whatever the block's forward raises when it meets a symbol
        return f"it cannot be followed without values ({type(error).__name__})"
    return None


def _only_its_result_goes_on(block: nn.Module, graph: fx.Graph, addition: int) -> bool:
    """Whether nothing that was there before an addition is read behind it."""
    nodes = list(graph.nodes)
    behind = nodes.index(_flow(block, graph).additions()[addition]) + 1
    return not any(source in nodes[: behind - 1] for node in nodes[behind:] for source in node.all_input_nodes)


def operations_of(flow: Flow, owner: str) -> list[str]:
    """Return the names of the functions and methods that a forward calls on activations itself, in order."""
    own = (n for n in flow.nodes if n.op != "call_module" and flow.graph.owners.get(n, "") == owner)
    names = (name_of(node).strip("_") for node in own)
    return ["sub" if name == "rsub" else name for name in names if name not in ("", "only_default", "getitem")]


def scaled_block_class(block: nn.Module, places: Places) -> type[nn.Module]:
    """Return the class that ``block`` becomes.

    Its forward passes operands of its additions, each given as ``(addition, operand)``, through the :class:`SkipInit`
    that it holds as :func:`skipinit_name` says.
    """
    original = type(block)
    copied = meta_copy(block)
    graphs, settings, forwards = dict[bool, fx.Graph](), dict[bool, tuple[Setting, ...]](), dict[bool, Any]()
    for training in (False, True):
        graphs[training], settings[training] = own_graph(copied.train(training)), settings_of(copied)
        _scale(copied, graphs[training], places)
        forwards[training] = _compiled(original, graphs[training])
    members: dict[str, Any] = {"__module__": original.__module__, "_places": places}
    members |= {"_forwards": forwards, "_settings": settings, "_graphs": graphs}
    return type(f"Scaled{original.__name__}", (_Rewritten, original), members)


class _Rewritten(ScaledSum):
    """What the classes that are made here have in common: a forward for each mode, and the settings it holds for."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        for setting in self._settings[self.training]:
            now = setting.now(self)
            if now is not setting.value and (type(now) is not type(setting.value) or now != setting.value):
                name = ".".join(setting.names)
                raise UsageError(
                    f"{name} is {now!r}, but this forward was rewritten for {setting.value!r}: exclude its sum instead"
                )
        return self._forwards[self.training](self, *args, **kwargs)

    def __reduce_ex__(self: Any, _: Any) -> tuple[Any, ...]:
        # The class is made at run time: pickle rebuilds it from the original class and from what the block holds.
        if all(isinstance(self._modules[skipinit_name(addition)], fx.GraphModule) for addition, _ in self._places):
            return _alone(self).__reduce__()
        return _rebuild, (type(self).__bases__[1], self._places, self.__dict__)

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        memo[id(self)] = new = object.__new__(type(self))
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


def _alone(block: Any) -> fx.GraphModule:
    """Return a block of a fused model, whose scalars are programs by now, as a program of the mode that it is in."""
    graph = copy.deepcopy(block._graphs[block.training])
    graph._tracer_cls = None  # whoever reads it follows it with torch's own
    program = fx.GraphModule(block, graph, class_name=type(block).__name__)
    kept = {name: value for name, value in vars(block).items() if name not in ("_parameters", "_buffers", "_modules")}
    program.__dict__.update(kept)
    program._modules.update(block._modules)
    return program


def _rebuild(original: Any, places: Places, state: dict[str, Any]) -> nn.Module:
    block = cast(nn.Module, object.__new__(original))
    block.__dict__.update(state)
    held = {name: block._modules.pop(name) for name in (skipinit_name(addition) for addition, _ in places)}
    block.__class__ = scaled_block_class(block, places)
    block._modules.update(held)
    return block


def _flow(block: nn.Module, graph: fx.Graph) -> Flow:
    return Flow(Graph(graph), dict(block.named_modules(remove_duplicate=False)), ())


def _scale(block: nn.Module, graph: fx.Graph, places: Places) -> None:
    """Pass operands of additions through the scalars that the block holds."""
    flow = _flow(block, graph)
    held = {str(n.target).split(".")[0] for n in graph.nodes if n.op == "get_attr"}
    known = (isinstance(getattr(block, name, None), (Tensor, nn.Module)) for name in held)
    if not all(known) or any(name.startswith("_tensor_constant") for name in held):
        raise TypeError("the forward makes tensors of its own")
    additions = flow.additions()
    for addition, operand in places:
        node = additions[addition]
        branch = node.args[operand]
        if not isinstance(branch, fx.Node):
            raise TypeError("the operand is a constant")
        with graph.inserting_before(node):
            scaled = graph.create_node("call_module", skipinit_name(addition), (branch,))
        node.args = tuple(scaled if i == operand else arg for i, arg in enumerate(node.args))


def _compiled(original: type[nn.Module], graph: fx.Graph) -> Any:
    code = graph.python_code("self")
    scope = dict(code.globals)
    text = text_with(code.src, scope)
    exec(compile(text, f"<{original.__qualname__} with alpha>", "exec"), scope)  # noqa: S102  # our own graph
    return scope["forward"]
