"""nn.Module -> Plan: look, decide, and look again where a forward may notice the difference."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from normfree.analysis.findings import Findings, analyse, flows
from normfree.analysis.moments import Moments, input_moments
from normfree.edits import Init
from normfree.errors import NoNormError, UnsupportedModelError, UsageError
from normfree.norms import Norm, describe, find_norms, is_norm, looks_like_norm
from normfree.options import Asked, Options, takes_options
from normfree.planning.classes import asked, asked_unseen
from normfree.planning.deciding import Modules, Request, decide
from normfree.planning.guards import check_model, module_problems
from normfree.planning.hooks import computed_elsewhere, hooks_left_out
from normfree.plans import Plan
from normfree.tracing.copying import meta_copy
from normfree.tracing.inputs import Inputs
from normfree.tracing.leaves import calls_batch_norm
from normfree.tracing.randomness import with_memory
from normfree.tracing.trace import trace
from normfree.tracing.traces import Trace

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["look", "look_again", "plan"]


@takes_options
def plan(model: nn.Module, **options: Unpack[Asked]) -> Plan:
    """Say what :func:`normfree.convert` would do, without doing it.

    Args:
        model: Any module with batch normalisation in it. It is not changed.
        options: As for :func:`normfree.convert`.

    Raises:
        NoNormError: There is nothing to convert, or the patterns leave nothing.
        AlreadyConvertedError: The model was converted before.
        WrappedModelError: The model is wrapped (DDP, FSDP, ``torch.compile``, an average of weights, Opacus) or a
            ScriptModule.
        UnsupportedModelError: Something in the model has no exact conversion; all of it is listed.
        UsageError: An argument makes no sense.

    Example:
        >>> import normfree, torchvision
        >>> print(normfree.plan(torchvision.models.resnet18()))
        init: skipinit (no norm has been trained), alpha starts at 0, 20 weights are drawn anew
        norms: 20 (20 fold)
        sums: 8, 8 residual
        alphas: 8 placed, 0 declined
        looked at: (2, 3, 64, 64), found by its first convolution
    """
    made, _ = look(model, Options(**options))
    return made


def look(model: nn.Module, options: Options, *, loaded: bool = False) -> tuple[Plan, Callable[[], dict[str, Moments]]]:
    """Return the plan, and what computes, from the model's own norms, what the carried layers of the plan meet.

    ``loaded`` says that the weights come from somewhere: ``"auto"`` then never draws them anew.
    """
    check_model(model)
    modules, norms, described = dict(model.named_modules(remove_duplicate=False)), find_norms(model), _described(model)
    chosen, why = _choose_init(options.init, list(described.values()), loaded)
    problems = module_problems(model, described, chosen, options.exclude)
    if any(isinstance(module, LazyModuleMixin) for module in modules.values()):  # it cannot even be traced
        raise UnsupportedModelError(tuple(problems.values()))
    request = Request(modules, norms, chosen, why, options)
    with _undisturbed():
        copied = meta_copy(model)
        traced = trace(model, copied, frozenset(described), options.inputs)
        findings = analyse(copied, traced, norms)
        problems = _functional(modules, norms, traced, findings) | problems
        if problems:
            raise UnsupportedModelError(tuple(problems.values()))
        if not norms:
            raise NoNormError(f"this {type(model).__name__} holds no batch normalisation: there is nothing to convert")
        made = _unnoticed(copied, traced, request, decide(request, traced, findings))
        unseen = (*hooks_left_out(modules, copied), *computed_elsewhere(traced.graphs.values()))
        made = replace(made, opaque=(*made.opaque, *unseen))
    return made, lambda: _met(copied, traced, described, made)


def look_again(model: nn.Module, made: Plan, inputs: Inputs | None = None) -> Callable[[], dict[str, Moments]]:
    """Hold a plan from elsewhere to a model; return what computes what its carried layers meet, as :func:`look` does.

    Raises:
        UsageError: The plan is one of a fused model.
        UnsupportedModelError: Something in the model has no exact conversion.
    """
    if made.fused:
        raise UsageError("the plan is one of a fused model, which a file brings back: normfree.load(path, model=...)")
    check_model(model)
    described = _described(model)
    kept = tuple(edit.name for edit in made.norms if edit.action == "keep")
    problems = module_problems(model, described, made.init, kept)
    if problems:
        raise UnsupportedModelError(tuple(problems.values()))
    with _undisturbed():
        copied = meta_copy(model)
        traced = trace(model, copied, frozenset(described), inputs)
    return lambda: _met(copied, traced, described, made)


def _described(model: nn.Module) -> dict[str, Norm]:
    """Return what each norm is, under every name."""
    return {name: describe(m) for name, m in model.named_modules(remove_duplicate=False) if is_norm(m)}


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Leave the user's generator as it is, wherever he makes tensors, and let nobody look for garbage meanwhile.

    Graphs are made of many objects: to look among them takes a quarter of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        with with_memory(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        if enabled:
            gc.enable()


def _met(copied: nn.Module, traced: Trace, described: Mapping[str, Norm], made: Plan) -> dict[str, Moments]:
    """Return what the carried layers meet, by path; where graphs differ, or nothing is known, they are left out."""
    found: dict[str, Moments | None] = {}
    centred = [carried.path for carried in made.carried if carried.centred]
    with _undisturbed():  # an activation that draws its slopes is probed
        for flow in flows(copied, traced, described):
            for path, moments in input_moments(flow, described, centred).items():
                found[path] = moments if found.get(path, moments) is not None else None
    return {path: moments for path, moments in found.items() if moments is not None}


def _functional(modules: Modules, norms: Iterable[str], traced: Trace, findings: Findings) -> dict[str, str]:
    """Find the places that call ``F.batch_norm`` themselves; on a weight they may."""
    unseen = {
        path: f"{path or 'the root'}: was not seen running and calls F.batch_norm; use an nn.BatchNorm module"
        for path, module in modules.items()
        if not traced.graphs
        and calls_batch_norm(module)
        and not isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
    }
    seen = "calls F.batch_norm on an activation; use an nn.BatchNorm module there"
    if any(name not in findings.sites for name in norms):
        seen += ", or, if it comes to one by a function that some object holds, let the object hold the module"
    # A norm whose tensors somebody takes, or that nobody knows, is refused by its own name.
    known = (place for place in findings.functional if place not in modules or not looks_like_norm(modules[place]))
    return unseen | {place: f"{place}: {seen}" for place in known if not findings.read}


def _unnoticed(copied: nn.Module, traced: Trace, request: Request, made: Plan) -> Plan:
    """Return a plan after which every forward goes the way it goes now, whatever it asks about classes.

    Layers that it asks about keep theirs; a norm cannot.

    Raises:
        UnsupportedModelError: A forward goes another way without a norm.
    """
    seen = bool(traced.graphs)
    unknown = not seen or request.init == "preserve"
    fixed = asked_unseen(request.modules[""], request.norms, seen) if unknown else frozenset[str]()
    while True:
        found = asked(copied, traced, made)
        gone = {edit.name for edit in made.removed}
        lost = gone & (found | fixed)
        if lost:
            what = "a forward asks for its class, and goes another way once it is gone; exclude it, or do not ask"
            raise UnsupportedModelError(tuple(f"{name}: {what}" for name in request.norms if name in lost))
        if found <= fixed:
            return made
        fixed |= found
        keeping = fixed - request.norms.keys()
        made = decide(request, traced, analyse(copied, traced, request.norms, keeping))
        made = replace(made, unpaired=tuple(sorted(keeping)))


def _choose_init(init: str, norms: list[Norm], loaded: bool) -> tuple[Init, str]:
    """Return the starting point and why. From ``"auto"`` no trained weight may be drawn anew.

    Raises:
        UsageError: Nothing tells whether the model has been trained.
    """
    if init == "skipinit" or init == "preserve":
        return init, "asked for"  # type: ignore[return-value]  # narrowed by the comparison
    found = [norm.trained() for norm in norms]
    if any(found):
        return "preserve", "norms have been trained or are frozen"
    if loaded:
        return "preserve", "the weights are loaded ones"
    if found and all(trained is None for trained in found):
        raise UsageError(
            "init='auto' cannot tell whether this model has been trained: no norm of it has statistics or a shift that "
            "learns. Say init='preserve' to keep its function, or init='skipinit' to draw its weights anew (--init)"
        )
    return "skipinit", "no norm has been trained"
