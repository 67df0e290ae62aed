"""What a plan lists: what becomes of each norm and sum, where each alpha goes, in which units each layer learns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from normfree.analysis.sums import Kind
from normfree.analysis.tails import Place
from normfree.layers import Channels, skipinit_name
from normfree.layers.passing import Moves

__all__ = ["UNSEEN", "Action", "Alpha", "Carried", "Init", "NormEdit", "SumEdit", "Units"]

Action = Literal["fold", "affine", "delete", "bias", "keep"]
Init = Literal["skipinit", "preserve"]
UNSEEN = "unknown"
"""What feeds a norm that was not seen."""
_CHANNELS = 2**20
"""More than any layer has: a stored plan must not ask for more."""


@dataclass(frozen=True)
class NormEdit:
    """What becomes of one norm.

    Attributes:
        name: Qualified name.
        aliases: Further names of the same module.
        type: Its class.
        feed: What computes its input.
        action: ``fold``: ``producer`` takes gain and bias into its weight where it is called directly before the slot
            that holds them; under ``skipinit`` it gets a bias, and nothing stays. ``affine``: a per-channel gain and
            bias stay in the slot. ``delete``: nothing stays. ``bias``: a per-channel bias stays. ``keep``: the norm
            stays.
        producer: The layer that takes gain and bias.
        reason: Why.
        copy: The slot copies, because somebody writes into it in place.
        into: The layer that alone reads what stays in the slot, and takes it, or some of it, when the model is fused.
        through: Modules between the slot and ``into``, or ``producer``, and what only one of them stands in: a hook
            there sees what passes.
        moves: How much of it the layer behind takes.
        gain_learns: The gain in the slot is a parameter: where a gamma is zero, a weight before it alone never learns.
    """

    name: str
    aliases: tuple[str, ...]
    type: str
    feed: str
    action: Action
    producer: str | None
    reason: str
    copy: bool = False
    into: str | None = None
    through: tuple[str, ...] = ()
    moves: Moves = "affine"
    gain_learns: bool = False


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
    ``examples/experiments/finetuning_forms.py``; powers of two, so that the originals come back bit for bit.

    Attributes:
        weight: A weight behind which a norm was, where it meets one position (1x1, linear). A step of it moves the
            output by ``(gamma / sigma) ** 2`` over the square of this; batch norm itself, at the first step, by a half
            to a quarter of ``(gamma / sigma) ** 2``, as it takes mean and scale of a batch out of the gradient.
        filter: The same where it meets several positions, but for the mean of a filter over them.
        mean: That mean. Neighbouring pixels are alike: with a correlation of 0.6 a filter of 3x3 meets 16 times as much
            along its mean as along the rest of it, so this is four times ``filter`` (whitened inputs: LeCun, Bottou,
            Orr & Müller 1998, section 4.3).
        bias: A bias that a norm left.
        alpha: A SkipInit scalar.
        head: What a classifier sees is divided by a power of two, so that its norm is about this, or smaller; 0 leaves
            it alone. It is never enlarged: a fresh classifier is the first to diverge.
    """

    weight: float = 1.0
    filter: float = 1.0
    mean: float = 1.0
    bias: float = 1.0
    alpha: float = 1.0
    head: float = 0.0

    def __post_init__(self) -> None:
        powers = (self.weight, self.filter, self.mean, self.bias, self.alpha)
        if not all(math.frexp(unit)[0] == 0.5 and unit < 2**20 for unit in powers):
            raise ValueError(f"units are powers of two, not {self}")

    def of_head(self, norm: float) -> float:
        """Return the unit of the weight of a classifier that sees an input of this norm."""
        return 2.0 ** max(round(math.log2(norm / self.head)), 0) if self.head > 0 and norm > 0 else 1.0


@dataclass(frozen=True)
class Carried:
    """A layer whose weight is in units of its own (``preserve``).

    Attributes:
        path: The layer.
        unit: How many times the original weight its weight is; of a head, found when the plan is applied.
        centred: Whether it learns as if its input had no mean: what it meets is known from the norms.
        head: Whether it is what the last norms feed.
        mean_unit: How many times less than the rest of a filter its mean over its positions moves.
        keeps_bias: Its bias learns on, besides that in the slot behind it, since somebody else uses it.
    """

    path: str
    unit: float
    centred: bool
    head: bool = False
    mean_unit: float = 1.0
    keeps_bias: bool = False
