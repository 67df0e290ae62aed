"""Running a model to see what it does: on a copy that is as it was afterwards, with every draw standing still."""

from __future__ import annotations

import contextlib
import inspect
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from normfree.rewriting.changing import set_class
from normfree.tracing.inputs import fresh, tensors
from normfree.tracing.leaves import is_layer
from normfree.tracing.randomness import Still, random_halves
from normfree.tracing.recorder import Recorder
from normfree.tracing.traces import Graph

__all__ = ["disguised", "leaves_of", "record"]


def leaves_of(model: nn.Module, sites: frozenset[str]) -> dict[str, bool]:
    """Return whether each module of a model is one operation, by its first name; to be asked before a run is recorded.

    In a converted model the norms are gone, but what held them is looked into as before.
    """
    holders = {site[:i] for site in sites for i, letter in enumerate(site) if letter == "."}
    return {
        name: is_layer(module) and (name not in holders or type(module).__module__.startswith("torch.nn"))
        for name, module in model.named_modules()
    }


@torch.inference_mode(False)
@torch.no_grad()
def record(
    model: nn.Module,
    sites: frozenset[str],
    leaves: Mapping[str, bool],
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    training: bool,
    classes: Mapping[int, type[nn.Module]] | None = None,
    recorder: Callable[..., Recorder] = Recorder,
) -> Graph:
    """Run a model that nobody else uses once, in a mode, and return what it did.

    ``leaves`` is what :func:`leaves_of` returned; ``classes`` tells what modules really are that answer to
    another class meanwhile, by identity.
    """
    args, kwargs = fresh(arguments)
    meta = bool(tensors((args, kwargs))) and all(tensor.is_meta for tensor in tensors((args, kwargs)))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_as_it_was(model))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # whatever a forward says, it says when it runs for its user
        entered = stack.enter_context(random_halves())
        for module in model.modules():
            module.__dict__["training"] = training  # for a module, setting an attribute takes long
        recording = recorder(model, leaves, sites, classes or {}, entered, meta)
        for name, tensor in _named(model, args, kwargs):
            recording.give(name, tensor)
        stack.enter_context(torch.device("meta") if meta else Still())
        stack.enter_context(_with_versions())
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))  # what is compiled cannot be watched
        with recording:
            out = model(*args, **kwargs)
        return recording.finish(tensors(out))


@contextlib.contextmanager
def _with_versions() -> Iterator[None]:
    """Let inference mode do no more than not to ask for gradients: its tensors do not tell that they were written into.

    Only for whoever enters it meanwhile.
    """
    mode: Any = torch.inference_mode
    enter = mode.__enter__

    def enter_without(self: Any) -> None:
        self._inference_mode_context = torch.set_grad_enabled(torch.is_grad_enabled() and not self.mode)

    mode.__enter__ = enter_without
    try:
        yield
    finally:
        mode.__enter__ = enter


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the tensors that are given, each with the name of its parameter."""
    try:
        given = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    except TypeError:  # the call itself will say what is wrong
        given = {"x": (args, kwargs)}
    for name, value in given.items():
        for tensor in tensors(value):
            yield name, tensor


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Leave a model as it is, whatever its forwards keep, count or hang on its modules, in whatever class they are."""
    kept = [(module, type(module), dict(module.__dict__), _containers(module)) for module in model.modules()]
    values = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    try:
        yield
    finally:
        for module, cls, before, containers in kept:
            set_class(module, cls)
            module.__dict__.clear()
            module.__dict__.update(before)
            for container, content in containers:
                if container or content:
                    container.clear()
                    (container.extend if isinstance(container, list) else container.update)(content)
        for buffer, value in values:
            buffer.copy_(value)


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    """Return what a module keeps in dicts, lists and sets, each with a copy."""
    return [(value, value.copy() if value else ()) for value in module.__dict__.values() if type(value) in _CONTAINERS]


_CONTAINERS = (dict, OrderedDict, list, set)


@contextlib.contextmanager
def disguised(model: nn.Module, classes: Mapping[str, type[nn.Module]]) -> Iterator[dict[int, type[nn.Module]]]:
    """Let some modules answer to other classes, and yield what they really are, by identity."""
    modules = {name: model.get_submodule(name) for name in classes}
    real = {id(module): type(module) for module in modules.values()}
    try:
        for name, module in modules.items():
            set_class(module, classes[name])
        yield real
    finally:
        for module in modules.values():
            set_class(module, real[id(module)])
