"""Running the graphs of a model node by node, each part with the arguments that the whole model gives it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import fx, nn

from normfree.analysis.findings import flows
from normfree.analysis.flow import Flow
from normfree.proofs.observing import Still
from normfree.tracing.inputs import fresh
from normfree.tracing.trace import trace
from normfree.tracing.traces import MODES

__all__ = ["replay"]

R = TypeVar("R", bound=fx.Interpreter)


@torch.no_grad()
def replay(
    model: nn.Module,
    sites: frozenset[str],
    inputs: Callable[[], tuple[list[Any], dict[str, Any]]],
    interpreter: Callable[[nn.Module, Flow, str], R],
    modes: Collection[str] = MODES,
) -> Iterator[R]:
    """Run every part of a model in every mode, with dropout off, and yield what ran it.

    Args:
        model: The model; its modes and buffers change.
        sites: Names of the norms, or of what stands in their place.
        inputs: Returns fresh arguments of the model.
        interpreter: Makes what runs the graph of a part: from the part, its flow, and the prefix of its names.
        modes: The modes to run in.
    """
    paths = [part.path for part in trace(model, sites).parts]
    while paths:
        path = paths.pop(0)
        module = model.get_submodule(path)
        passed = _part_arguments(model, module, inputs)
        prefix = f"{path}." if path else ""
        if passed is None:  # the model never calls it with these inputs, but may call what it holds
            paths += [prefix + child for child, held in module.named_children() if any(True for _ in held.children())]
            continue
        below = frozenset(site.removeprefix(prefix) for site in sites if site.startswith(prefix))
        # Again, with what this call really passes: flags and optional tensors decide which way the forward goes.
        traced = trace(module, below, passed)
        whole = replace(traced, parts=tuple(p for p in traced.parts if not p.path))
        for _, mode, flow in flows(module, whole, below):
            if mode not in modes:
                continue
            module.train(mode == "train")
            runner = interpreter(module, flow, prefix)
            try:
                with Still():
                    runner.run(*fresh(_in_order(module, passed)))
            except (TypeError, KeyError, IndexError, RuntimeError):
                continue  # arguments that a graph cannot take, such as ``*levels``
            yield runner


def _part_arguments(
    model: nn.Module, part: nn.Module, inputs: Callable[[], tuple[list[Any], dict[str, Any]]]
) -> dict[str, Any] | None:
    """Return what ``part`` is called with when the whole model runs, by name; ``None`` if it is not called."""
    args, kwargs = inputs()
    captured: list[dict[str, Any]] = []

    def keep(_: nn.Module, a: tuple[Any, ...], k: dict[str, Any]) -> None:
        bound = inspect.signature(part.forward).bind(*a, **k)
        bound.apply_defaults()
        captured.append({name: fresh(value) for name, value in bound.arguments.items()})

    handle = part.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with Still():
            model(*args, **kwargs)
    finally:
        handle.remove()
    return captured[0] if captured else None


def _in_order(part: nn.Module, passed: dict[str, Any]) -> list[Any]:
    """Return the arguments one by one, as a graph takes them."""
    kinds = {name: p.kind for name, p in inspect.signature(part.forward).parameters.items()}
    spread = (value if kinds[name] is inspect.Parameter.VAR_POSITIONAL else [value] for name, value in passed.items())
    return [value for values in spread for value in values]
