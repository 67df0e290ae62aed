"""The plan: a frozen, printable, JSON-able list of edits with a reason for each, and of what was declined."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal, cast

from torch import nn

from normfree.analysis.sums import Kind
from normfree.analysis.tails import Place
from normfree.errors import CheckpointError, UsageError
from normfree.files.plain import from_plain
from normfree.layers import Channels, skipinit_name

__all__ = ["PLAN_ATTRIBUTE", "Action", "Alpha", "Carried", "Init", "NormEdit", "Plan", "SumEdit", "Units", "plan_on"]

Action = Literal["fold", "affine", "delete", "bias", "keep"]
Init = Literal["skipinit", "preserve"]
PLAN_ATTRIBUTE = "_normfree_plan"
"""Where a converted model keeps its plan; a fused one its text, which can be unpickled without this package."""
_CHANNELS = 2**20  # more than any layer has: a stored plan must not ask for more


@dataclass(frozen=True)
class NormEdit:
    """What becomes of one norm.

    Attributes:
        name: Qualified name.
        aliases: Further names of the same module.
        type: Its class.
        feed: What computes its input.
        action: ``fold``: its gain and bias (under ``skipinit`` only a bias) move onto ``producer``.
            ``affine``: a per-channel gain and bias stay in the slot. ``delete``: nothing stays.
            ``bias``: a per-channel bias stays. ``keep``: the norm stays.
        producer: The layer that takes gain and bias.
        reason: Why.
        copy: The slot copies, because somebody writes into it in place.
    """

    name: str
    aliases: tuple[str, ...]
    type: str
    feed: str
    action: Action
    producer: str | None
    reason: str
    copy: bool = False


@dataclass(frozen=True)
class Alpha:
    """One SkipInit scalar: on a weight, in the slot of a norm or an identity, on an output, or on an operand of a sum.

    Attributes:
        path: The module that carries it, or the block that adds.
        place: Where in it; see :class:`normfree.analysis.tails.Candidate`.
        channels: The range of channels it scales, or all of them.
        addition: For ``sum``: which addition of the module's own forward.
        operand: For ``sum``: which operand of it.
    """

    path: str
    place: Place
    channels: Channels = None
    addition: int = 0
    operand: int = 0

    def __post_init__(self) -> None:
        start, stop = self.channels or (0, 1)
        if not (0 <= start < stop <= _CHANNELS and 0 <= self.addition < _CHANNELS and 0 <= self.operand < _CHANNELS):
            raise ValueError(f"no alpha lives in channels {self.channels} of addition {self.addition}")

    @property
    def holder(self) -> str:
        """The module whose parameter ``alpha`` it is: for ``sum`` a SkipInit that the block at ``path`` holds."""
        return f"{self.path}.{skipinit_name(self.addition)}" if self.place == "sum" else self.path


@dataclass(frozen=True)
class SumEdit:
    """What becomes of one sum: its kind with the reason, a scalar for each branch, and the branches declined."""

    name: str
    kind: Kind
    reason: str
    alphas: tuple[Alpha, ...] = ()
    declined: tuple[str, ...] = ()


@dataclass(frozen=True)
class Units:
    """How many times what it stands for a parameter is: the coordinates in which a converted network learns.

    A step of SGD then moves what it stands for by the square of that less, a step of Adam by that less. Chosen by
    ``examples/finetuning_forms.py``; powers of two, so that the originals come back bit for bit.

    Attributes:
        weight: A weight behind which a norm was. A step of it moves the output by ``(gamma / sigma) ** 2`` over the
            square of this; batch norm itself, at the first step, by a half to a quarter of ``(gamma / sigma) ** 2``,
            as it takes mean and scale of a batch out of the gradient.
        bias: A bias that a norm left.
        alpha: A SkipInit scalar.
        head: What a classifier sees is divided by a power of two, so that its norm is about this; 0 leaves it alone.
    """

    weight: float = 1.0
    bias: float = 1.0
    alpha: float = 1.0
    head: float = 0.0

    def __post_init__(self) -> None:
        if not all(math.frexp(unit)[0] == 0.5 and unit < 2**20 for unit in (self.weight, self.bias, self.alpha)):
            raise ValueError(f"units are powers of two, not {self}")


@dataclass(frozen=True)
class Carried:
    """A layer whose weight is in units of its own (``preserve``).

    Attributes:
        path: The layer.
        unit: How many times the original weight its weight is; of a head, found when the plan is applied.
        centred: Whether it learns as if its input had no mean: what it meets is known from the norms.
        head: Whether it is what the last norms feed.
        learns_gain: Whether its gain is a parameter: where a gamma is zero, a weight behind it alone would never learn.
    """

    path: str
    unit: float
    centred: bool
    head: bool = False
    learns_gain: bool = False


@dataclass(frozen=True)
class Plan:
    """All edits of one conversion. Printing it shows a summary; :meth:`to_json` and :meth:`from_json` round-trip.

    Attributes:
        init: The starting point.
        init_reason: Why ``"auto"`` chose it, or that the caller did.
        alpha: Starting value of every scalar.
        norms: Every norm of the model.
        sums: Every sum of activations that a trace reached.
        biases: Layers that get a bias of zeros.
        weights: Layers that a norm rescaled (``skipinit``), with the gain of the activation behind them.
        carried: Layers whose weight is in units of its own (``preserve``).
        units: The units.
        reset: Those layers are drawn anew.
        out_of_place: Activations that must no longer work in place.
        inplace_activations: Whether the others may; if not, what carries an alpha hands out copies.
        opaque: Modules that could not be traced, each with the error.
        fused: Gain and alpha have been baked into plain layers since; see :func:`normfree.fuse`.
        merged: Blocks whose parallel branches have become one layer then.
    """

    init: Init
    init_reason: str
    alpha: float
    norms: tuple[NormEdit, ...]
    sums: tuple[SumEdit, ...]
    biases: tuple[str, ...] = ()
    weights: tuple[tuple[str, float], ...] = ()
    carried: tuple[Carried, ...] = ()
    units: Units = Units()
    out_of_place: tuple[str, ...] = ()
    opaque: tuple[tuple[str, str], ...] = ()
    reset: bool = True
    inplace_activations: bool = True
    fused: bool = False
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
    def sites(self) -> frozenset[str]:
        """Every name of every norm."""
        return frozenset(name for edit in self.norms for name in (edit.name, *edit.aliases))

    @property
    def declined(self) -> tuple[str, ...]:
        """Residual branches that get no scalar, each with the reason."""
        return tuple(f"{total.name}: {reason}" for total in self.sums for reason in total.declined)

    def __str__(self) -> str:
        actions = Counter(edit.action for edit in self.norms)
        kinds = Counter(total.kind for total in self.sums)
        drawn = f", {len(self.drawn)} weights are drawn anew" if self.drawn else ""
        lines = [
            f"init: {self.init} ({self.init_reason}), alpha starts at {self.alpha:g}{drawn}",
            f"norms: {len(self.norms)} ({', '.join(f'{n} {action}' for action, n in actions.items())})",
            f"sums: {len(self.sums)}" + "".join(f", {n} {kind}" for kind, n in kinds.items()),
            f"alphas: {len(self.alphas)} placed, {len(self.declined)} declined",
            *(f"declined: {text}" for text in self.declined),
            *(f"not traced: {path or 'the root'}: {error}" for path, error in self.opaque),
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
