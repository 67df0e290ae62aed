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
from normfree.norms import describe, find_norms
from normfree.planning.plan import plan
from normfree.plans import Plan
from normfree.rewriting.applying import rewrite
from normfree.rewriting.changing import become
from normfree.rewriting.pairing import unpaired_
from normfree.tracing.copying import deep_copy

__all__ = ["ARMS", "Subject", "arm_names", "build_arms", "deployed"]


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


def deployed(arm: nn.Module) -> nn.Module:
    """Return an arm as it is deployed: in eval mode, with whatever can be folded into a weight folded."""
    model = deep_copy(arm)
    if find_norms(model):
        model = convert(model, init="preserve")
    if any(isinstance(module, (ScaledWeight, ChannelAffine)) for module in model.modules()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FuseWarning)  # what stays a multiplication is measured as one
            model = fuse_(model)
    return model.eval()


def _frozen(subject: Subject) -> nn.Module:
    """Norms that stay in eval mode while all else is trained."""
    model = deep_copy(subject.model)
    for name in find_norms(model):
        model.get_submodule(name).eval()
    return model


def _groupnorm(subject: Subject) -> nn.Module:
    """What Opacus' ``ModuleValidator.fix`` puts in place of a BatchNorm: ``gcd(32, C)`` groups, a new affine.

    On timm's norm-and-activation layers it finds nothing to fix; here they are replaced too, and keep their activation.
    """
    model = deep_copy(subject.model)
    for name in find_norms(model):
        module = model.get_submodule(name)
        norm = describe(module)
        group_norm = nn.GroupNorm(math.gcd(32, norm.features), norm.features, norm.eps)
        rest = [part for part in (norm.drop, norm.act) if part is not None]
        become(module, nn.Sequential(group_norm, *rest) if rest else group_norm)
    return model


def _activation(subject: Subject) -> nn.Module:
    """Gain, bias and alpha of the converted model on activations, as every other implementation has them."""
    model = convert(subject.model, init=subject.init)
    unpaired_(model)
    behind = {model.get_submodule(layer): model.get_submodule(slot) for layer, slot in Plan.of(model).pairs.items()}
    scaled: dict[nn.Module, nn.Module] = {}
    for layer in model.modules():
        if isinstance(layer, ScaledWeight):
            raw, layer.raw_alpha = layer.raw_alpha, None
            affine = ChannelAffine(raw_alpha=raw, channels=layer.alpha_channels, unit=layer.alpha_unit)
            slot, plain = behind.get(layer), fuse_(nn.Sequential(layer))[0]
            if isinstance(slot, ChannelAffine):
                _as_a_norm_has_them(slot, plain)
            if raw is not None:
                scaled[plain] = nn.Sequential(plain, affine)
    for parent in list(model.modules()):
        parent._modules.update([(n, scaled[child]) for n, child in parent._modules.items() if child in scaled])
    return model


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


def _deleted(subject: Subject, biases: bool) -> nn.Module:
    """Norms deleted, with biases in their place or with nothing, and no alpha: what each costs, and the limit."""
    full = plan(subject.model, init="skipinit")
    full = replace(full, sums=tuple(replace(total, alphas=(), declined=()) for total in full.sums))
    if not biases:
        gone = (replace(edit, action="delete") if edit.action in ("bias", "affine") else edit for edit in full.norms)
        full = replace(full, norms=tuple(gone), biases=())
    model = deep_copy(subject.model)
    rewrite(model, full)
    return model


def _nf(subject: Subject) -> nn.Module | None:
    """The normalisation-free model of the same name that timm has for some."""
    import timm

    name = f"nf_{subject.source.partition(':')[2].partition('.')[0]}"
    return zoo.build(zoo.find(f"timm:{name}")) if timm.is_model(name) else None


ARMS: Mapping[str, Callable[[Subject], nn.Module | None]] = {
    "bn": lambda subject: deep_copy(subject.model),
    "frozen": _frozen,
    "groupnorm": _groupnorm,
    "activation": _activation,
    "normfree": lambda subject: convert(subject.model, init=subject.init),
    "biases": lambda subject: _deleted(subject, biases=True),
    "bare": lambda subject: _deleted(subject, biases=False),
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


def build_arms(subject: Subject, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """Build the arms that exist for this model, to be trained in the mode that they are in."""
    subject = replace(subject, model=deep_copy(subject.model).train())
    built = {name: ARMS[name](subject) for name in names}
    return {name: arm for name, arm in built.items() if arm is not None}
