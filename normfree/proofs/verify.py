"""Proof, not a count: what a conversion promises, measured on the model itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from normfree.errors import UsageError, one_line
from normfree.plans import Plan
from normfree.proofs import PROOFS, Case, Proof
from normfree.proofs.case import Found
from normfree.proofs.reference import Reference
from normfree.tracing.inputs import Inputs, arguments, tensors
from normfree.tracing.trace import example_input

__all__ = ["Proof", "Report", "each_proof", "verdict", "verify"]


@dataclass(frozen=True)
class Report:
    """The proofs of one conversion; printing it shows them.

    Attributes:
        proofs: One entry a proof. ``passed`` is ``None`` where the conversion makes no such claim, or where the
            original would be needed and is not here.

    Example:
        >>> import normfree, torch, torchvision
        >>> model = torchvision.models.resnet18()
        >>> report = normfree.verify(normfree.convert(model), model, torch.randn(2, 3, 64, 64))
        >>> report.ok, [proof.number for proof in report.proofs if proof.passed]
        (True, [1, 2, 4, 5, 6])
    """

    proofs: tuple[Proof, ...]

    @property
    def ok(self) -> bool:
        """Whether no proof failed."""
        return all(proof.passed is not False for proof in self.proofs)

    def __str__(self) -> str:
        return "\n".join(f"{p.number} {verdict(p):11} {p.name}: {p.detail}" for p in self.proofs)

    def to_json(self) -> str:
        """Return the report as JSON text; ``"ok"`` is ``null`` where no proof failed, but one could not be made."""
        ok = None if self.ok and any(proof.missing for proof in self.proofs) else self.ok
        return json.dumps({"ok": ok, "proofs": [asdict(proof) for proof in self.proofs]})


def verdict(proof: Proof) -> str:
    """Return the word for what came of a proof."""
    if proof.passed is None:
        return "not made" if proof.missing else "not claimed"
    return "ok" if proof.passed else "FAILED"


def verify(
    model: nn.Module,
    original: nn.Module | None = None,
    inputs: Inputs | None = None,
    *,
    plan: Plan | None = None,
) -> Report:
    """Prove a conversion on copies in float64; neither model is changed.

    A model that cannot run in float64 is run in its own type, and the report says so. The bound of an error is then
    eight times what the output moves by when every weight is rounded once more.

    Args:
        model: What :func:`normfree.convert` returned, or :func:`normfree.fuse` made of it.
        original: The model before conversion. Proof 3 needs it; proofs 4 to 6 compare with it. Values are compared
            unless most of what the model learns has moved, as in training.
        inputs: Arguments of ``model``: a tensor ``(N, C, *)``, a tuple (of tensors, lists or dicts), or a mapping of
            keyword arguments; a batch of at least two. Default: white noise of the shape the model's first layer or
            its timm configuration asks for.
        plan: The plan that was applied, if ``model`` is a piece of what was converted.

    Returns:
        The six proofs: (1) no batch-norm operator runs, (2) no output depends on the rest of the batch,
        (3) ``preserve`` computes what the original computes, (4) alpha = 0 makes every scaled branch zero and nothing
        writes into a skip path, (5) everything learns, (6) nothing of the norms is left in the state. With the original
        here 3, 5 and 6 also hold the model to what its plan makes of the original. What a broken model raises is a
        proof that failed.

    Raises:
        UsageError: The model carries no plan, the batch has fewer than two samples, or inputs are for eval mode only.

    Example:
        >>> import torch, normfree, torchvision
        >>> original = torchvision.models.resnet18()
        >>> normfree.verify(normfree.convert(original), original, torch.randn(2, 3, 64, 64)).ok
        True
    """
    with torch.inference_mode(False), torch.enable_grad():  # the fifth proof takes gradients, whoever asks for it
        return Report(tuple(each_proof(model, original, inputs, plan=plan)))


def each_proof(
    model: nn.Module,
    original: nn.Module | None = None,
    inputs: Inputs | None = None,
    *,
    plan: Plan | None = None,
    structure: nn.Module | None = None,
    reference: Reference | None = None,
) -> Iterator[Proof]:
    """Yield the proofs one by one as they are done; see :func:`verify`.

    Where the original is not to be had, ``structure`` is its architecture with any weights, and ``reference`` has
    samples of what it computed.
    """
    plan = plan if plan is not None else Plan.of(model)
    args, kwargs = arguments(example_input(model) if inputs is None else inputs)
    sizes = {x.shape[0] for x in tensors((args, kwargs)) if x.dim() > 0}
    if not sizes or min(sizes) < 2:
        raise UsageError("verify needs a batch of at least two: with one sample nothing can depend on the others")
    case = Case(model, original, structure if original is None else original, reference, plan, args, kwargs)
    note = ""
    for number, (name, proof) in enumerate(PROOFS.items(), start=1):
        try:
            found = proof(case)
        except UsageError:
            raise
        except Exception as error:  # whatever a broken model raises is what there is to say of it
            found = Found(False, None, f"it raises {one_line(error)}")
            if number == 1:  # it runs the model in both modes
                case, note = _that_runs(case)
                found = proof(case) if note else found
        yield Proof(number, name, found.passed, found.figure, found.detail + note, found.missing)


def _that_runs(case: Case) -> tuple[Case, str]:
    """Return the case in a type in which a model runs that has raised, with a note if that is its own.

    Raises:
        UsageError: Neither model nor original runs in train mode, although the model does in eval mode.
        Exception: The model does not run on the input, nor does the original, if it is here.
    """
    own = replace(case, dtype=case.own_dtype)
    wide, errors = _errors(case, case.model), _errors(own, case.model)
    if wide and not errors:  # a forward may mix float64 with tensors of its own
        said = type(next(iter(wide.values()))).__name__
        return own, f" (in {str(own.dtype)[6:]}: in float64 it raises {said})"
    runs = case.structure is not None and not (_errors(case, case.structure) and _errors(own, case.structure))
    if runs or not errors:
        return case, ""  # it is the conversion's fault, as the proofs say
    if False in errors:
        raise errors[False]
    raise UsageError(
        f"this {type(case.model).__name__} does not run in train mode (it raises {one_line(errors[True])}): give "
        "inputs= with which it runs in both modes, as labels that it wants while it learns, by keyword"
    )


def _errors(case: Case, model: nn.Module) -> dict[bool, Exception]:
    """Return what a model raises, by mode: train mode is True."""
    found = {}
    for training in (False, True):
        try:
            with torch.no_grad():
                case.run(case.exact(model, training))
        except UsageError:
            raise
        except Exception as error:
            found[training] = error
    return found
