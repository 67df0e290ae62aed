"""The six proofs, one function each; a new one is a function more in :data:`PROOFS`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normfree.analysis import flows
from normfree.observing import NormSpy, Recorder, Still, module_stack, out_of_place, tensors
from normfree.plans import Plan
from normfree.reference import Reference
from normfree.rewriting import rewrite
from normfree.sums import find_sums, sum_names
from normfree.tracing import trace

__all__ = ["PROOFS", "Case", "Proof"]

TOLERANCE = 1e-9
"""Relative to the largest output, in float64."""


@dataclass(frozen=True)
class Proof:
    """One proof.

    Attributes:
        number: 1 to 6, as in the documentation.
        name: What is claimed.
        passed: The verdict, or ``None`` where nothing is claimed.
        figure: The measured value behind it: an error, or a count.
        detail: The figure in words, and the places where it fails.
    """

    number: int
    name: str
    passed: bool | None
    figure: float | None
    detail: str


@dataclass(frozen=True)
class Case:
    """A converted model, what it came from, and something to run them on.

    Attributes:
        model: The converted model.
        original: The model before conversion, if it is here.
        structure: The same architecture with any weights, if it is here.
        reference: Samples of what the original computed, if they are here.
        plan: The plan that was applied.
        args: Arguments of a forward pass.
        kwargs: Keyword arguments of it.
    """

    model: nn.Module
    original: nn.Module | None
    structure: nn.Module | None
    reference: Reference | None
    plan: Plan
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @functools.cached_property
    def kept(self) -> frozenset[str]:
        """Norms that the plan leaves in place."""
        return frozenset(edit.name for edit in self.plan.norms if edit.action == "keep")

    def double(self, model: nn.Module, training: bool) -> nn.Module:
        """Return a copy of ``model`` in float64."""
        copied = copy.deepcopy(model).double()
        _strip_hooks(copied)
        return copied.train(training)

    def run(self, model: nn.Module, sample: int | None = None, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Run ``model`` with dropout off, on everything or on one sample, and return its output tensors."""
        args, kwargs = self.inputs(sample, dtype)
        with Still():
            return tensors(model(*args, **kwargs))

    def inputs(self, sample: int | None = None, dtype: torch.dtype = torch.float64) -> tuple[list[Any], dict[str, Any]]:
        """Return fresh arguments: a model may write into its input."""

        def pick(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            x = x.detach().to(dtype) if x.is_floating_point() else x.detach()
            return (x if sample is None else x[sample : sample + 1]).clone()

        return [pick(x) for x in self.args], {name: pick(x) for name, x in self.kwargs.items()}


def _strip_hooks(model: nn.Module) -> None:
    """The user's hooks must not see the runs of a proof; those of torch's own weight reparametrisations must stay."""
    for module in model.modules():
        module._forward_hooks.clear()
        for key, hook in list(module._forward_pre_hooks.items()):
            if not type(hook).__module__.startswith("torch.nn.utils"):
                del module._forward_pre_hooks[key]


def _error(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference over the largest value, over all outputs."""
    if [x.shape for x in a] != [x.shape for x in b]:
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if x.is_floating_point() and x.numel():
            difference = (x.double() - y.double()).abs().max() / x.double().abs().max().clamp_min(1e-300)
            worst = max(worst, float(difference)) if bool(torch.isfinite(difference)) else float("inf")
    return worst


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


@torch.no_grad()
def no_norm_runs(case: Case) -> Proof:
    """1: no batch-norm operator sees an activation, in train and in eval mode."""
    seen: dict[str, None] = {}
    for training in (True, False):
        model = case.double(case.model, training)
        args, kwargs = case.inputs()
        with module_stack(model) as stack, NormSpy(tensors((args, kwargs)), stack) as spy, Still():
            model(*args, **kwargs)
        seen.update(dict.fromkeys(spy.seen))
    found = [name for name in seen if name not in case.kept]
    kept = f"; {len(case.kept)} norms stay as planned" if case.kept else ""
    detail = f"{len(found)} batch-norm operators on activations" + (f": {_some(found)}" if found else "") + kept
    return Proof(1, "no batch-norm operator runs", not found, float(len(found)), detail)


@torch.no_grad()
def batch_independent(case: Case) -> Proof:
    """2: in train mode with dropout off, ``f(x)[i] == f(x[i:i+1])``."""
    name = "no output depends on the rest of the batch"
    if case.kept:
        return Proof(2, name, None, None, f"{len(case.kept)} norms stay as planned")
    model = case.double(case.model, training=True)
    together = case.run(model)
    size = next(x.shape[0] for x in tensors((case.args, case.kwargs)) if x.dim() > 0)
    worst = 0.0
    for i in range(size):
        alone = case.run(model, sample=i)
        mine = [x[i : i + 1] if x.dim() and x.shape[0] == size else x for x in together]
        worst = max(worst, _error(mine, alone))
    return Proof(2, name, worst <= TOLERANCE, worst, f"largest relative difference {worst:.1e}")


@torch.no_grad()
def same_function(case: Case) -> Proof:
    """3: ``preserve`` computes in eval mode what the original computes."""
    name = "output equals the original's in eval mode"
    if case.plan.init != "preserve" or case.plan.alpha != 1:
        return Proof(3, name, None, None, f"init is {case.plan.init} and alpha starts at {case.plan.alpha:g}")
    if case.original is None:
        return _same_as_reference(case, name)
    exact = case.run(case.double(case.original, training=False))
    # Gains are stored in the model's own dtype: that the edits are exact shows when they are made in float64.
    again = case.double(case.original, training=False)
    rewrite(again, case.plan)
    error = _error(exact, case.run(again))
    dtype = next((p.dtype for p in case.model.parameters() if p.is_floating_point()), torch.float64)
    before = copy.deepcopy(case.original).eval()
    after = copy.deepcopy(case.model).eval()
    rounding = _error(exact, case.run(before, dtype=dtype))
    own = _error(exact, case.run(after, dtype=dtype))
    # The same function in another order of operations rounds differently, not worse.
    passed = error <= TOLERANCE and own <= max(8 * rounding, TOLERANCE)
    detail = f"relative error {error:.1e} in float64; {own:.1e} in {str(dtype)[6:]}, where the original's is {rounding:.1e}"
    return Proof(3, name, passed, error, detail)


def _same_as_reference(case: Case, name: str) -> Proof:
    error = None if case.reference is None else case.reference.error(case.model)
    if case.reference is None or error is None:
        return Proof(3, name, None, None, "the original is not here to compare with")
    rounding = case.reference.rounding
    detail = f"relative error {error:.1e} to the recorded output in {case.reference.dtype}; the original's is {rounding:.1e}"
    return Proof(3, name, error <= max(8 * rounding, TOLERANCE), error, detail)


@torch.no_grad()
def branches_vanish(case: Case) -> Proof:
    """4: alpha = 0 makes every scaled branch exactly zero, and nothing writes into a skip path."""
    model = case.double(case.model, training=False)
    scaled = {total.name: len(total.alphas) for total in case.plan.sums if total.alphas}
    for alpha in case.plan.alphas:
        _parameter(model, alpha.path).zero_()
    zero, written, ran = _watch(case, model, set(scaled))
    blamed = written
    if written and case.structure is not None:
        theirs = _watch(case, case.double(case.structure, training=False), set(scaled))[1]
        blamed = [name for name in written if name not in theirs]
    alive = [name for name in scaled if name in ran and zero.get(name, 0) < scaled[name]]
    unseen = [name for name in scaled if name not in ran]
    moved = _inplace_error(case, model)
    if moved and case.structure is not None:
        moved = 0.0 if _inplace_error(case, case.double(case.structure, training=False)) else moved
    problems = [
        *([f"branch not zero at {_some(alive)}"] if alive else []),
        *([f"not reached: {_some(unseen)}"] if unseen else []),
        *([f"skip path overwritten at {_some(blamed)}"] if blamed else []),
        *([f"in-place activations change the output by {moved:.1e}"] if moved else []),
    ]
    total = sum(scaled.values())
    detail = "; ".join(problems) or f"{total} branches exactly zero at alpha = 0, their skip paths untouched"
    return Proof(4, "alpha = 0 leaves exactly the skip paths", not problems, float(len(problems)), detail)


def _parameter(model: nn.Module, path: str) -> nn.Parameter:
    alpha = model.get_submodule(path).alpha
    if not isinstance(alpha, nn.Parameter):
        raise TypeError(f"{path} carries no alpha")
    return alpha


def _watch(case: Case, model: nn.Module, names: set[str]) -> tuple[dict[str, int], list[str], set[str]]:
    """Return how many branches are zero at each sum, where a skip path was overwritten, and which sums ran."""
    sites = frozenset(name for edit in case.plan.norms for name in (edit.name, *edit.aliases))
    traced = trace(model, sites)
    zero: dict[str, int] = {}
    written: list[str] = []
    for prefix, mode, flow in flows(model, traced, sites):
        model.train(mode == "train")
        named = sum_names(flow)
        watched = {
            s.node: (s.skip, s.base, s.branches)
            for s in find_sums(flow)
            if prefix + named[s.node] in names and s.skip is not None and s.base is not None
        }
        module = model.get_submodule(prefix.rstrip("."))
        arguments = _part_arguments(case, model, module) if watched else None
        if arguments is None:
            continue
        recorder = Recorder(module, flow.graph.fx, watched)
        with Still():
            recorder.run(*arguments)
        for node, count in recorder.zero_branches.items():
            name = prefix + named[node]
            zero[name] = min(count, zero.get(name, count))
            if not recorder.intact[node]:
                written.append(name)
    return zero, list(dict.fromkeys(written)), set(zero)


def _part_arguments(case: Case, model: nn.Module, part: nn.Module) -> list[Any] | None:
    """Return what ``part`` is called with when the whole model runs, or ``None`` if it is not called."""
    args, kwargs = case.inputs()
    if part is model and not kwargs:
        return args
    captured: list[list[Any]] = []

    def keep(_: nn.Module, a: tuple[Any, ...], k: dict[str, Any]) -> None:
        captured.append([*(_clone(x) for x in a), *(_clone(x) for x in k.values())])

    handle = part.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with Still():
            model(*args, **kwargs)
    finally:
        handle.remove()
    return captured[0] if captured else None


def _clone(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x


def _inplace_error(case: Case, model: nn.Module) -> float:
    """How far the output moves when every in-place activation works out of place."""
    worst = 0.0
    for training in (True, False):
        model.train(training)
        state = copy.deepcopy(model.state_dict())
        plain = case.run(model)
        model.load_state_dict(state)  # a norm that stays updates its statistics in train mode
        with out_of_place(model):
            worst = max(worst, _error(plain, case.run(model)))
    return worst


def everything_learns(case: Case) -> Proof:
    """5: what got a gradient before gets one now, and every alpha gets a finite one that is not zero."""
    name = "everything learns"
    model = case.double(case.model, training=True)
    alphas = {alpha.path: _parameter(model, alpha.path) for alpha in case.plan.alphas}
    grads = _gradients(case, model)
    missing = [key for key in _expected(case) if key in dict(model.named_parameters()) and grads.get(key) is None]
    waiting = _without_gradient(alphas)
    first = len(alphas) - len(waiting)
    infinite = [path for path, alpha in alphas.items() if alpha.grad is not None and not alpha.grad.isfinite().all()]
    # An alpha behind another zero scale learns as soon as that one has moved: move it, and look again.
    while waiting:
        before = len(waiting)
        _open_scales(model, {id(alphas[path]) for path in waiting})
        _gradients(case, model)
        waiting = [path for path in waiting if path in _without_gradient(alphas)]
        if len(waiting) == before:
            break
    late = len(alphas) - first - len(waiting)
    problems = [
        *([f"no gradient any more: {_some(missing)}"] if missing else []),
        *([f"alpha gets none: {_some(waiting)}"] if waiting else []),
        *([f"alpha's is not finite: {_some(infinite)}"] if infinite else []),
    ]
    behind = f", {late} once the zero scale before it has moved" if late else ""
    trained = [alpha for alpha in alphas.values() if alpha.requires_grad]
    detail = "; ".join(problems) or f"{sum(g is not None for g in grads.values())} gradients, {len(trained)} alphas{behind}"
    return Proof(5, name, not problems, float(len(problems)), detail)


def _gradients(case: Case, model: nn.Module) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    outputs = [x for x in case.run(model) if x.requires_grad]
    generator = torch.Generator().manual_seed(0)
    loss = [
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)).sum() for x in outputs
    ]
    if loss:
        torch.stack(loss).sum().backward()  # type: ignore[no-untyped-call]  # torch's own stub
    return {name: p.grad for name, p in model.named_parameters()}


def _expected(case: Case) -> list[str]:
    """Names of the parameters that get a gradient in the original; without it, of all that ask for one."""
    if case.structure is None:
        return [name for name, p in case.model.named_parameters() if p.requires_grad and not name.endswith("alpha")]
    grads = _gradients(case, case.double(case.structure, training=True))
    return [name for name, grad in grads.items() if grad is not None]


def _without_gradient(alphas: dict[str, nn.Parameter]) -> list[str]:
    return [
        path
        for path, alpha in alphas.items()
        if alpha.requires_grad and (alpha.grad is None or not bool(torch.any(alpha.grad)))
    ]


@torch.no_grad()
def _open_scales(model: nn.Module, closed: set[int]) -> None:
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in ("alpha", "gain") and id(parameter) not in closed and not torch.any(parameter):
            parameter.fill_(1)


def clean_state(case: Case) -> Proof:
    """6: no statistics are left, and keys outside the plan are the original's."""
    state = case.model.state_dict()
    inside = tuple(f"{name}." for name in case.kept)
    statistics = [
        key
        for key in state
        if key.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
        and not key.startswith(inside)
    ]
    problems = [f"statistics left: {_some(statistics)}"] if statistics else []
    if case.structure is not None:
        problems += _key_changes(case, case.structure.state_dict(), state)
    detail = "; ".join(problems) or f"{len(state)} keys, none of them statistics"
    return Proof(6, "no statistics are left in the state", not problems, float(len(problems)), detail)


def _key_changes(case: Case, before: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    """Compare with the original: only what the plan names may differ, in keys and (``preserve``) in values."""
    names = [n for edit in case.plan.removed for n in (edit.name, *edit.aliases)]
    slots = tuple(f"{name}." for name in names)
    touched = {f"{edit.producer}.{leaf}" for edit in case.plan.removed for leaf in ("gain", "bias")}
    touched |= {f"{path}.bias" for path in case.plan.biases} | {f"{a.path}.alpha" for a in case.plan.alphas}
    shared = _aliases(case.model, touched)
    lost = [k for k in before if k not in state and not k.startswith(slots)]
    new = [k for k in state if k not in before and k not in shared and not k.startswith(slots)]
    drawn = {f"{path}.{leaf}" for path, _ in case.plan.weights for leaf in ("weight", "bias")}
    moved = [
        k
        for k in state
        if k in before and k not in shared | _aliases(case.model, drawn) and not k.startswith(slots)
        and not torch.equal(state[k].cpu(), before[k].cpu())
    ]
    compare = case.original is not None and case.plan.init == "preserve"
    named = {"keys lost": lost, "keys unplanned": new, "values changed": moved if compare else []}
    return [f"{what}: {_some(keys)}" for what, keys in named.items() if keys]


def _aliases(model: nn.Module, names: set[str]) -> set[str]:
    """Add the further names of parameters that are registered more than once."""
    every = dict(model.named_parameters(remove_duplicate=False))
    chosen = {id(every[name]) for name in names if name in every}
    return names | {name for name, parameter in every.items() if id(parameter) in chosen}


PROOFS: tuple[Callable[[Case], Proof], ...] = (
    no_norm_runs,
    batch_independent,
    same_function,
    branches_vanish,
    everything_learns,
    clean_state,
)
