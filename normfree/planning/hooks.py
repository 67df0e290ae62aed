"""Which hooks see what passes through a module, or its gradient, and what a look did not see."""

from __future__ import annotations

import dis
import itertools
from collections.abc import Iterable, Iterator, Mapping, Set
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from normfree.analysis.passing import Taker
from normfree.tracing.traces import Graph

__all__ = ["any_global_hook", "computed_elsewhere", "hooks_left_out", "hooks_on", "may_be_absorbed"]

_KINDS = tuple(
    name for name in vars(nn.Module()) if name.endswith("_hooks") and name.startswith(("_forward", "_backward"))
)


def hooks_on(module: nn.Module) -> set[str]:
    """Return the kinds of hooks that hang on a module."""
    return {kind for kind in _KINDS if module.__dict__[kind]}


def any_global_hook() -> bool:
    """Whether some hook hangs on every module."""
    return any(getattr(torch_module, f"_global{kind}", None) for kind in _KINDS)


def may_be_absorbed(modules: Mapping[str, nn.Module], norm: str, taker: Taker, apart: Set[int]) -> bool:
    """Whether nobody sees what passes from a norm to what takes it over, or uses the weight or bias of that apart.

    ``apart`` are the identities of the layers of which somebody does.
    """
    layer, others = modules[taker.path], [modules[path] for path in (norm, *taker.behind)]
    between = [module for path in taker.through for module in modules[path].modules()]
    seen = any_global_hook() or any(map(hooks_on, (*others, *between))) or hooks_on(layer) - {"_forward_hooks"}
    return not seen and id(layer) not in apart


def hooks_left_out(modules: Mapping[str, nn.Module], copied: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield where a hook hangs that did not run on a copy, and that may change what its module is given or returns."""
    for path, module in modules.items():
        looked_at = copied.get_submodule(path)
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            hooks = {key: hook for key, hook in vars(module)[kind].items() if key not in vars(looked_at)[kind]}
            if any(map(_may_return, hooks.values())):
                where = path or "the root"
                yield where, f"a hook on {where} is not run; sums that it makes get no scalar"


def computed_elsewhere(graphs: Iterable[Graph]) -> Iterator[tuple[str, str]]:
    """Yield where something was computed that a run could not see."""
    for path in dict.fromkeys(path for graph in graphs for path in sorted(graph.elsewhere)):
        where = path or "the root"
        what = "computes something in code that cannot be seen (a thread, NumPy, an extension)"
        yield where, f"{where} {what}; sums in that code get no scalar"


def _may_return(hook: Any) -> bool:
    """Whether a hook may return something else than nothing."""
    if not isinstance(hook, FunctionType):
        return True
    steps = [step for step in dis.get_instructions(hook.__code__) if step.opname not in ("CACHE", "NOP")]
    last = [before for before, step in itertools.pairwise(steps) if step.opname == "RETURN_VALUE"]
    last += [step for step in steps if step.opname == "RETURN_CONST"]
    return not all(step.opname in ("LOAD_CONST", "RETURN_CONST") and step.argval is None for step in last)
