"""The arms of a benchmark: one model with its norms, without them, and with what others put in their place."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from normfree import zoo
from normfree.conversion import convert
from normfree.deployment.fuse import FuseWarning, fuse_
from normfree.errors import UsageError
from normfree.layers import ChannelAffine, ScaledWeight
from normfree.norms import Norm, describe, find_norms
from normfree.planning.plan import plan
from normfree.plans import Plan
from normfree.rewriting.applying import rewrite
from normfree.rewriting.pairing import unpaired_
from normfree.tracing.copying import deep_copy

__all__ = ["ARMS", "Arm", "Subject", "arm_names", "build_arms"]


@dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        source: The model's name, ``torchvision:resnet50``.
        model: The model as its library builds it; no arm changes it.
        init: Starting point of the converted arms.
    """

    source: str
    model: nn.Module
    init: Literal["skipinit", "preserve"]


@dataclass(frozen=True)
class Arm:
    """One way to do without, or with, normalisation.

    Attributes:
        model: Trained in train mode.
        frozen: Names of norms that stay in eval mode meanwhile.
    """

    model: nn.Module
    frozen: tuple[str, ...] = ()

    def train(self) -> nn.Module:
        """Put the model in train mode and return it."""
        self.model.train()
        for name in self.frozen:
            self.model.get_submodule(name).eval()
        return self.model

    def fused(self) -> nn.Module:
        """Return the model as it is deployed: in eval mode, with whatever can be folded into a weight folded."""
        model = deep_copy(self.model)
        if find_norms(model):
            model = convert(model, init="preserve")
        if any(isinstance(module, (ScaledWeight, ChannelAffine)) for module in model.modules()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FuseWarning)  # what stays a multiplication is measured as one
                model = fuse_(model)
        return model.eval()


def _bn(subject: Subject) -> Arm:
    return Arm(deep_copy(subject.model))


def _frozen(subject: Subject) -> Arm:
    return Arm(deep_copy(subject.model), tuple(find_norms(subject.model)))


def _groupnorm(subject: Subject) -> Arm:
    """What Opacus' ``ModuleValidator.fix`` puts in place of a BatchNorm: ``gcd(32, C)`` groups, a new affine.

    On timm's norm-and-activation layers it finds nothing to fix; here they are replaced too, and keep their activation.
    """
    model = deep_copy(subject.model)
    slots = {}
    for name in find_norms(model):
        norm = describe(model.get_submodule(name))
        slots[name] = _with_activation(nn.GroupNorm(math.gcd(32, norm.features), norm.features, norm.eps), norm)
    _put(model, slots)
    return Arm(model)


def _with_activation(group_norm: nn.Module, norm: Norm) -> nn.Module:
    rest = [module for module in (norm.drop, norm.act) if module is not None]
    return nn.Sequential(group_norm, *rest) if rest else group_norm


def _normfree(subject: Subject) -> Arm:
    return Arm(convert(subject.model, init=subject.init))


def _activation(subject: Subject) -> Arm:
    """Gain, bias and alpha of the converted model on activations, as every other implementation has them."""
    model = convert(subject.model, init=subject.init)
    unpaired_(model)
    behind = {model.get_submodule(layer): model.get_submodule(slot) for layer, slot in Plan.of(model).pairs.items()}
    slots: dict[str, nn.Module] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, ScaledWeight):
            raw, layer.raw_alpha = layer.raw_alpha, None
            affine = ChannelAffine(raw_alpha=raw, channels=layer.alpha_channels, unit=layer.alpha_unit)
            slot, plain = behind.get(layer), fuse_(nn.Sequential(layer))[0]
            if isinstance(slot, ChannelAffine):
                _as_a_norm_has_them(slot, plain)
            slots[name] = plain if raw is None else nn.Sequential(plain, affine)
    _put(model, slots)
    return Arm(model)


@torch.no_grad()
def _as_a_norm_has_them(slot: ChannelAffine, plain: nn.Module) -> None:
    """Give a slot a gain and a bias that learn, with the bias of the layer in front of it."""
    gain, bias = cast(Tensor, slot.gain) * slot.gain_unit, cast(Tensor, slot.bias) / slot.bias_unit
    own = plain._parameters["bias"]
    plain._parameters["bias"] = None
    slot.gain_unit = slot.bias_unit = 1.0
    slot.__dict__.pop("gain", None)
    slot._parameters["gain"] = nn.Parameter(gain)
    slot.constant = False
    slot.bias = nn.Parameter(bias if own is None else bias + gain * own)


def _bare(subject: Subject) -> Arm:
    """Norms deleted and nothing in their place, neither alpha nor bias: the limit."""
    full = _without_alpha(subject)
    norms = tuple(
        replace(edit, action="delete" if edit.action in ("bias", "affine") else edit.action) for edit in full.norms
    )
    return _rewritten(subject, replace(full, norms=norms, biases=()))


def _biases(subject: Subject) -> Arm:
    """Norms deleted and biases in their place, no alpha: tells what a bias costs from what alpha and gain do."""
    return _rewritten(subject, _without_alpha(subject))


def _without_alpha(subject: Subject) -> Plan:
    full = plan(subject.model, init="skipinit")
    return replace(full, sums=tuple(replace(total, alphas=(), declined=()) for total in full.sums))


def _rewritten(subject: Subject, changed: Plan) -> Arm:
    model = deep_copy(subject.model)
    rewrite(model, changed)
    return Arm(model)


def _nf(subject: Subject) -> Arm | None:
    """The normalisation-free model of the same name that timm has for some."""
    import timm

    name = f"nf_{subject.source.partition(':')[2].partition('.')[0]}"
    return Arm(zoo.build(zoo.find(f"timm:{name}"))) if timm.is_model(name) else None


ARMS: Mapping[str, Callable[[Subject], Arm | None]] = {
    "bn": _bn,
    "frozen": _frozen,
    "groupnorm": _groupnorm,
    "activation": _activation,
    "normfree": _normfree,
    "biases": _biases,
    "bare": _bare,
    "nf": _nf,
}


def arm_names(wanted: str) -> tuple[str, ...]:
    """Read a comma-separated list of arms.

    Raises:
        UsageError: One of them is unknown.
    """
    names = tuple(dict.fromkeys(name.strip() for name in wanted.split(",") if name.strip()))
    unknown = [name for name in names if name not in ARMS]
    if unknown or not names:
        raise UsageError(f"unknown arms {', '.join(unknown) or '(none given)'}; known: {', '.join(ARMS)}")
    return names


def build_arms(subject: Subject, names: tuple[str, ...]) -> dict[str, Arm]:
    """Build the arms that exist for this model."""
    built = {name: ARMS[name](subject) for name in names}
    return {name: arm for name, arm in built.items() if arm is not None}


def _put(model: nn.Module, slots: Mapping[str, nn.Module]) -> None:
    """Replace modules under every name that they have."""
    by_identity = {id(model.get_submodule(name)): slot for name, slot in slots.items()}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in by_identity:
                parent._modules[name] = by_identity[id(child)]
