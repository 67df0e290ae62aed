"""Proof 5: everything that learnt before learns now, and so does every alpha, by the gradient of what is computed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normfree.errors import some
from normfree.proofs.case import Case, Found
from normfree.proofs.forward import form_of

__all__ = ["everything_learns"]

Gradients = dict[str, Tensor | None]
_RELATIVE, _ABSOLUTE = 1e-6, 1e-10
"""How far a gradient may be off, of its own largest entry and of the largest of all, in float64."""


def everything_learns(case: Case) -> Found:
    """5: what got a gradient before gets one now, every alpha a finite one that is not zero, and each the right one."""
    model = case.exact(case.model, training=True)
    alphas = {path: raw for path, raw in case.alphas_in(model).items() if raw is not None}
    expected = _expected(case)
    try:
        grads = _gradients(case, model)
    except RuntimeError as error:  # autograd refuses, for example where something was overwritten that it had kept
        passed = None if expected is None else False
        return Found(passed, None, f"backward fails: {str(error).splitlines()[0]}")
    missing = [key for key in expected or () if key in grads and grads[key] is None]
    infinite = [path for path, alpha in alphas.items() if alpha.grad is not None and not alpha.grad.isfinite().all()]
    closed = _without_gradient(alphas)
    waiting, before = closed, list[str]()
    # An alpha behind another zero scale learns as soon as that one has moved: move it, and look again.
    while waiting != before:
        before = waiting
        _open_scales(model, {id(alphas[path]) for path in waiting})
        _gradients(case, model)
        waiting = [path for path in waiting if path in _without_gradient(alphas)]
    late = len(closed) - len(waiting)
    dead = _dead(case, expected, waiting)
    waiting = [path for path in waiting if path not in dead]
    behind = f", {late} once the zero scale before it has moved" if late else ""
    behind += f"; nothing comes to {some(dead)}, and nothing did in the original" if dead else ""
    trained = sum(alpha.requires_grad for alpha in alphas.values())
    figures = f"{sum(g is not None for g in grads.values())} gradients, {trained} alphas{behind}"
    del model, alphas, grads, expected  # copies in float64 are large, and more of them follow
    problems = [
        *([f"no gradient any more: {some(missing)}"] if missing else []),
        *([f"alpha gets none: {some(waiting)}"] if waiting else []),
        *([f"alpha's is not finite: {some(infinite)}"] if infinite else []),
        *_wrong(case),
    ]
    return Found(not problems, float(len(problems)), "; ".join(problems) or figures)


def _gradients(case: Case, model: nn.Module, nudge: float = 0.0) -> Gradients:
    model.zero_grad(set_to_none=True)
    outputs = [x for x in case.run(model, nudge=nudge) if x.requires_grad]
    generator = torch.Generator().manual_seed(0)
    loss = [(x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum() for x in outputs]
    if loss:
        torch.stack(loss).sum().backward()  # type: ignore[no-untyped-call]  # torch's own stub
    return {name: p.grad for name, p in model.named_parameters()}


def _expected(case: Case) -> Gradients | None:
    """Return the gradients of the original, of the parameters that get one; ``None`` if its own backward fails.

    Without the original, of all that ask for one.
    """
    if case.structure is None:
        own = case.model.named_parameters()
        return {name: None for name, p in own if p.requires_grad and not name.endswith("raw_alpha")}
    try:
        grads = _gradients(case, case.exact(case.structure, training=True))
    except RuntimeError:
        return None
    return {name: grad for name, grad in grads.items() if grad is not None}


def _dead(case: Case, expected: Gradients | None, waiting: list[str]) -> list[str]:
    """Return the alphas whose branch ends in what learns nothing in the original either: all its gradients are zero.

    In train mode as it is, or with its norms frozen: those of a batch bring to life what their statistics leave dead.
    """
    if case.structure is None or expected is None or not waiting:
        return []
    frozen = _gradients(case, case.frozen(training=True))
    ends = {alpha.holder: alpha.path for alpha in case.plan.alphas}
    found = []
    for holder in waiting:
        path = ends[holder]
        while path and not any(True for _ in case.structure.get_submodule(path).parameters()):
            path = path.rpartition(".")[0]
        keys = [key for key, _ in case.structure.get_submodule(path).named_parameters(path)]
        if any(not any(_largest(grads.get(key)) for key in keys) for grads in (expected, frozen)):
            found.append(holder)
    return found


def _without_gradient(alphas: dict[str, nn.Parameter]) -> list[str]:
    return [path for path, alpha in alphas.items() if alpha.requires_grad and not _largest(alpha.grad)]


@torch.no_grad()
def _open_scales(model: nn.Module, closed: set[int]) -> None:
    for name, parameter in model.named_parameters():
        is_scale = name.rpartition(".")[2] in ("raw_alpha", "gain")
        if is_scale and id(parameter) not in closed and not torch.any(parameter):
            parameter.fill_(1)


def _wrong(case: Case) -> list[str]:
    """Hold every gradient, at random alpha, to that of the plain form: the derivative of what the plan makes."""
    modes = (True, False) if case.dtype == torch.float64 else ()
    wrong = sorted({name for training in modes for name in _wrong_in(case, training)})
    return [f"another gradient than that of what the plan makes: {some(wrong)}"] if wrong else []


def _wrong_in(case: Case, training: bool) -> list[str]:
    model = case.at_alpha(training)
    form = form_of(case, model)
    if form is None:
        return []
    _hang_hooks(case, model)
    try:
        found = _gradients(case, model)
        del model
        right = _gradients(case, form)
    except RuntimeError:
        return []  # told already
    wrong = _different(found, right)
    if wrong:  # at a kink of an activation a gradient is anything: what moves with a rounding is no witness
        wrong = [name for name in wrong if name not in _different(right, _gradients(case, form, nudge=2**-45))]
    return wrong


def _different(found: Gradients, right: Gradients) -> list[str]:
    """Name the parameters whose gradients differ by more than rounding."""
    largest = max(map(_largest, right.values()), default=0.0)
    wrong = []
    for name in sorted(found.keys() & right.keys()):
        ours, theirs = found[name], right[name]
        difference = ours if theirs is None else theirs if ours is None else ours - theirs
        if not _largest(difference) <= _RELATIVE * _largest(theirs) + _ABSOLUTE * largest:
            wrong.append(name)
    return wrong


def _largest(grad: Tensor | None) -> float:
    return float(grad.abs().max()) if grad is not None and grad.numel() else 0.0


def _hang_hooks(case: Case, model: nn.Module) -> None:
    """Put on the copies of parameters what hangs on the parameters, other than what hung on the original's."""
    theirs = dict(case.structure.named_parameters()) if case.structure is not None else {}
    copies = dict(model.named_parameters())
    for name, parameter in case.model.named_parameters():
        known = (getattr(theirs.get(name), "_backward_hooks", None) or {}).values()
        for hook in (parameter._backward_hooks or {}).values():
            if hook not in known:
                copies[name].register_hook(hook)  # type: ignore[no-untyped-call]  # torch's own
