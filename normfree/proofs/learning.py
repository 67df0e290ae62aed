"""Proof 5: everything that learnt before learns now, and so does every alpha."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normfree.errors import some
from normfree.proofs.case import Case, Proof, alpha_of

__all__ = ["everything_learns"]


def everything_learns(case: Case) -> Proof:
    """5: what got a gradient before gets one now, and every alpha gets a finite one that is not zero."""
    name = "everything learns"
    model = case.exact(case.model, training=True)
    carried = () if case.plan.fused else case.plan.alphas
    alphas = {alpha.holder: alpha_of(model, alpha.holder) for alpha in carried}
    expected = _expected(case)
    try:
        grads = _gradients(case, model)
    except RuntimeError as error:  # autograd refuses, for example where something was overwritten that it had kept
        passed = None if expected is None else False
        return Proof(5, name, passed, None, f"backward fails: {str(error).splitlines()[0]}")
    missing = [key for key in expected or () if key in dict(model.named_parameters()) and grads.get(key) is None]
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
        *([f"no gradient any more: {some(missing)}"] if missing else []),
        *([f"alpha gets none: {some(waiting)}"] if waiting else []),
        *([f"alpha's is not finite: {some(infinite)}"] if infinite else []),
    ]
    behind = f", {late} once the zero scale before it has moved" if late else ""
    trained = [alpha for alpha in alphas.values() if alpha.requires_grad]
    detail = (
        "; ".join(problems) or f"{sum(g is not None for g in grads.values())} gradients, {len(trained)} alphas{behind}"
    )
    return Proof(5, name, not problems, float(len(problems)), detail)


def _gradients(case: Case, model: nn.Module) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    outputs = [x for x in case.run(model) if x.requires_grad]
    generator = torch.Generator().manual_seed(0)
    loss = [(x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum() for x in outputs]
    if loss:
        torch.stack(loss).sum().backward()  # type: ignore[no-untyped-call]  # torch's own stub
    return {name: p.grad for name, p in model.named_parameters()}


def _expected(case: Case) -> list[str] | None:
    """Names of the parameters that get a gradient in the original, ``None`` if its own backward fails.

    Without the original, of all that ask for one.
    """
    if case.structure is None:
        return [name for name, p in case.model.named_parameters() if p.requires_grad and not name.endswith("raw_alpha")]
    try:
        grads = _gradients(case, case.exact(case.structure, training=True))
    except RuntimeError:
        return None
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
        if (
            name.rpartition(".")[2] in ("raw_alpha", "gain")
            and id(parameter) not in closed
            and not torch.any(parameter)
        ):
            parameter.fill_(1)
