"""The plan: a frozen, printable, JSON-able list of edits with a reason for each, and of what was declined."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import cast

from torch import nn

from normfree.edits import UNSEEN, Alpha, Carried, Init, NormEdit, SumEdit, Units
from normfree.errors import CheckpointError, UsageError, some
from normfree.files.typed_json import from_plain

__all__ = ["PLAN_ATTRIBUTE", "Plan", "plan_on"]

PLAN_ATTRIBUTE = "_normfree_plan"
"""Where a converted model keeps its plan; a fused one its text, which can be unpickled without this package."""


@dataclass(frozen=True)
class Plan:
    """All edits of one conversion. Printing it shows a summary; :meth:`to_json` and :meth:`from_json` round-trip.

    Attributes:
        init: The starting point.
        init_reason: Why ``"auto"`` chose it, or that the caller did.
        alpha: Starting value of every scalar.
        norms: Every norm of the model.
        sums: Every sum of activations that was seen.
        biases: Layers that get a bias of zeros.
        weights: Layers that a norm rescaled (``skipinit``), with the gain of the activation behind them.
        carried: Layers whose weight is in units of its own (``preserve``).
        units: The units.
        reset: Those layers are drawn anew.
        out_of_place: Activations that must no longer work in place.
        inplace_activations: Whether the others may; if not, what carries an alpha hands out copies.
        unpaired: Modules that keep their class, since a forward asks for it: they call a layer and its slot one by one.
        opaque: Why the model, or one mode of it, was not seen running: its name (empty), the error and where it arose;
            and the modules with a hook that did not run.
        looked: What the model was run on to see what it does, and who said so.
        fused: Gain and alpha have been baked into plain layers since; see :func:`normfree.fuse`.
        calibrated: What :func:`normfree.calibrate` has set since.
        merged: Blocks whose parallel branches became one layer when it was fused.

    Example:
        >>> import normfree, torchvision
        >>> plan = normfree.plan(torchvision.models.resnet18())
        >>> plan.norms[0].name, plan.norms[0].action, plan.norms[0].producer
        ('bn1', 'fold', 'conv1')
        >>> normfree.Plan.from_json(plan.to_json()) == plan
        True
    """

    init: Init
    init_reason: str
    alpha: float
    norms: tuple[NormEdit, ...]
    sums: tuple[SumEdit, ...]
    biases: tuple[str, ...] = ()
    weights: tuple[tuple[str, float], ...] = ()
    carried: tuple[Carried, ...] = ()
    units: Units = field(default_factory=Units)
    out_of_place: tuple[str, ...] = ()
    opaque: tuple[tuple[str, str], ...] = ()
    looked: str = ""
    reset: bool = True
    inplace_activations: bool = True
    unpaired: tuple[str, ...] = ()
    fused: bool = False
    calibrated: str = ""
    merged: tuple[str, ...] = ()

    @property
    def alphas(self) -> tuple[Alpha, ...]:
        """Every scalar that is placed; one that several calls of a module share is one."""
        return tuple(dict.fromkeys(alpha for total in self.sums for alpha in total.alphas))

    @property
    def drawn(self) -> tuple[tuple[str, float], ...]:
        """Every layer that is drawn anew, with its gain."""
        return self.weights if self.reset else ()

    @property
    def removed(self) -> tuple[NormEdit, ...]:
        """Every norm that goes."""
        return tuple(edit for edit in self.norms if edit.action != "keep")

    @property
    def pairs(self) -> dict[str, str]:
        """Every layer that takes gain and bias from the slot behind it, with the slot (``preserve``)."""
        if self.init != "preserve":
            return {}
        return {edit.producer: edit.name for edit in self.removed if edit.producer is not None}

    @property
    def keeping_bias(self) -> frozenset[str]:
        """Layers whose own bias learns on."""
        return frozenset(carried.path for carried in self.carried if carried.keeps_bias)

    @property
    def sites(self) -> frozenset[str]:
        """Every name of every norm."""
        return frozenset(name for edit in self.norms for name in (edit.name, *edit.aliases))

    @property
    def declined(self) -> tuple[str, ...]:
        """Residual branches that get no scalar, each with the reason."""
        return tuple(f"{total.name}: {reason}" for total in self.sums for reason in total.declined)

    @property
    def unseen(self) -> tuple[str, ...]:
        """Norms that go although nothing has shown what is around them."""
        return tuple(edit.name for edit in self.removed if edit.feed == UNSEEN)

    @property
    def warning(self) -> str:
        """What a user must know who would otherwise take the plan for a whole one."""
        why = dict(self.opaque).get("", f"the input {self.looked} does not reach {some(list(self.unseen))}")
        went = f"{len(self.unseen)} of {len(self.norms)} norms went unseen"
        way = "" if "torch.func" in why else ". Pass inputs= (--size) with which it runs"  # no input is to blame there
        return f"{went}, and residual branches around them have no scalar: {why}{way}"

    def __str__(self) -> str:
        actions = Counter(edit.action for edit in self.norms)
        kinds = Counter(total.kind for total in self.sums)
        declined = "an unknown number missing" if self.unseen else f"{len(self.declined)} declined"
        drawn = f", {len(self.drawn)} weights are drawn anew" if self.drawn else ""
        lines = [
            *([f"not seen: {self.warning}"] if self.unseen else []),
            f"init: {self.init} ({self.init_reason}), alpha starts at {self.alpha:g}{drawn}",
            f"norms: {len(self.norms)} ({', '.join(f'{n} {action}' for action, n in actions.items())})",
            f"sums: {len(self.sums)}" + "".join(f", {n} {kind}" for kind, n in kinds.items()),
            f"alphas: {len(self.alphas)} placed, {declined}",
            *([f"calibrated: {self.calibrated}"] if self.calibrated else []),
            *(f"declined: {text}" for text in self.declined),
            *([f"looked at: {self.looked}"] if self.looked else []),
            *(f"not seen: {why}" for _, why in self.opaque if not self.unseen),
        ]
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def of(cls, model: nn.Module) -> Plan:
        """Return the plan that a converted or fused model carries; raise :class:`UsageError` if it carries none."""
        if (found := plan_on(model)) is None:
            raise UsageError(f"this {type(model).__name__} was not converted by normfree: it carries no plan")
        return found

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what :meth:`to_json` wrote.

        Raises:
            CheckpointError: The text is not a plan.
        """
        try:
            return cast(Plan, from_plain(cls, json.loads(text)))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"the stored plan cannot be read: {error}") from error


def plan_on(model: nn.Module) -> Plan | None:
    """Return the plan that a model carries, if it does."""
    found: Plan | str | None = getattr(model, PLAN_ATTRIBUTE, None)
    return Plan.from_json(found) if isinstance(found, str) else found
