"""Every new tensor and module of a conversion, complete before the first write."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from normfree.analysis.moments import Moments
from normfree.edits import Alpha, NormEdit
from normfree.errors import UnsupportedModelError
from normfree.layers import (
    ChannelAffine,
    Channels,
    CopiedAffine,
    CopiedOutput,
    CopiedSkipInit,
    Copy,
    ScaledOutput,
    SkipInit,
    Vacant,
    scaled_output_class,
    scaled_weight_class,
    skipinit_name,
)
from normfree.norms import describe
from normfree.plans import Plan
from normfree.rewriting.blocks import scaled_block_class
from normfree.rewriting.changing import HOOKS
from normfree.rewriting.pairing import paired_class, specs
from normfree.rewriting.units import Carrier, carry, features_of, weight_of

__all__ = ["Writes", "prepare"]


@dataclass
class Writes:
    """Everything to be written, complete before the first write.

    Attributes:
        carriers: What layers get that stay where they are.
        slots: What else modules turn into.
        classes: The classes of all other modules that change theirs.
        outputs: Scalars of modules whose output is scaled.
        blocks: What blocks hold whose own forward adds.
    """

    carriers: dict[str, Carrier]
    slots: dict[str, nn.Module] = field(default_factory=dict)
    classes: dict[str, type[nn.Module]] = field(default_factory=dict)
    outputs: dict[str, nn.Parameter] = field(default_factory=dict)
    blocks: dict[str, dict[str, nn.Module]] = field(default_factory=lambda: defaultdict(dict))


def prepare(model: nn.Module, plan: Plan, met: Mapping[str, Moments] | None = None) -> Writes:
    """Compute what ``plan`` writes into ``model``, without touching it.

    ``met`` is what the carried layers meet, by path; ``None`` where the constants come from a file.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    writes = Writes(_carriers(modules, plan, met))
    in_slot = {alpha.path: alpha for alpha in plan.alphas if alpha.place == "norm"}
    for edit in plan.removed:
        writes.slots[edit.name] = _slot(modules, edit, plan, in_slot.get(edit.name))
    for path, spec in specs(modules, plan.pairs).items():
        with contextlib.suppress(ValueError, TypeError):  # it calls one by one then, as it always did
            if path not in plan.unpaired:
                writes.classes[path] = paired_class(type(modules[path]), spec)
    _check_finite(writes, modules)
    for alpha in plan.alphas:
        module = modules[alpha.path]
        if alpha.place == "weight":
            carrier = writes.carriers.setdefault(alpha.path, Carrier())
            carrier.raw_alpha = _alpha(plan, weight_of(module), weight_of(module).requires_grad)
            carrier.channels, carrier.alpha_unit = alpha.channels, plan.units.alpha
        elif alpha.place == "slot":
            writes.slots[alpha.path] = _skipinit(plan, module, model, alpha.channels)
        elif alpha.place == "sum":
            scalar = _skipinit(plan, module, model, None).train(module.training)
            writes.blocks[alpha.path][skipinit_name(alpha.addition)] = scalar
        elif alpha.place == "output" and hasattr(module, "alpha"):  # of its own, as nn.ELU has; it carries no state
            cls = ChannelAffine if plan.inplace_activations else CopiedAffine
            act, raw = _shell(module, alpha.path in plan.out_of_place), _alpha_beside(plan, module, model)
            writes.slots[alpha.path] = cls(raw_alpha=raw, act=act, unit=plan.units.alpha)
        elif alpha.place == "output":
            mixin = ScaledOutput if plan.inplace_activations else CopiedOutput
            before = writes.classes.get(alpha.path, type(module))
            writes.classes[alpha.path] = scaled_output_class(before, mixin)
            writes.outputs[alpha.path] = _alpha_beside(plan, module, model)
    for path in writes.blocks:  # its own text calls pairs together
        places = tuple((a.addition, a.operand) for a in plan.alphas if a.path == path)
        writes.classes[path] = scaled_block_class(modules[path], places)
    for path, carrier in writes.carriers.items():
        if carrier.changes_class:
            writes.classes[path] = scaled_weight_class(type(modules[path]))
    for path, slot in writes.slots.items():
        slot.training = modules[path].training
    return writes


def _carriers(modules: Mapping[str, nn.Module], plan: Plan, met: Mapping[str, Moments] | None) -> dict[str, Carrier]:
    """Return what the layers get that take a bias, are followed by a slot, or learn in units."""
    found: dict[str, Carrier] = {}
    for path in plan.pairs:
        old, keeps = modules[path]._parameters["bias"], path in plan.keeping_bias
        fixed = None if old is None or keeps else old.detach().clone()
        found[path] = Carrier(bias=old if keeps else None, feeds_slot=True, fixed_bias=fixed)
    for carried in plan.carried:
        carry(modules[carried.path], found.setdefault(carried.path, Carrier()), carried, plan.units, met)
    for path in plan.biases:
        weight = weight_of(modules[path])
        bias = weight.new_zeros(features_of(modules[path]))
        found[path] = Carrier(bias=nn.Parameter(bias, weight.requires_grad))
    return found


def _check_finite(writes: Writes, modules: Mapping[str, nn.Module]) -> None:
    """Refuse what a number of the model's own type cannot hold: float16 ends at 65504.

    Raises:
        UnsupportedModelError: A gain or a bias would be infinite; all layers are named.
    """
    made: dict[str, tuple[Tensor | None, ...]]
    made = {path: (c.bias, c.at_center) for path, c in writes.carriers.items()}
    made |= {path: (slot.gain, slot.bias) for path, slot in writes.slots.items() if isinstance(slot, ChannelAffine)}
    problems = [
        f"{path} ({type(modules[path]).__name__}): what the norm amounts to overflows "
        f"{str(next(t.dtype for t in tensors if t is not None)).removeprefix('torch.')}; convert it in float32"
        for path, tensors in made.items()
        if not all(t is None or t.is_meta or bool(t.detach().isfinite().all()) for t in tensors)
    ]
    if problems:
        raise UnsupportedModelError(tuple(problems))


def _slot(modules: Mapping[str, nn.Module], edit: NormEdit, plan: Plan, alpha: Alpha | None) -> nn.Module:
    module, model, preserve = modules[edit.name], modules[""], plan.init == "preserve"
    norm = describe(module)
    gain = bias = None
    unit = plan.units.bias if edit.producer is not None else 1.0
    times = next((carried.unit for carried in plan.carried if carried.path == edit.producer), 1.0)
    if edit.action in ("affine", "bias") or (edit.action == "fold" and preserve):
        layer = None if edit.producer is None else modules[edit.producer]
        like = _like(module, model) if layer is None else weight_of(layer)
        fresh = torch.zeros(norm.features, device=like.device)
        affine = norm.affine() if preserve else (fresh + 1 if edit.action == "affine" else None, fresh)
        # What was made of buffers learns not at all: else an activation that is written over twice would fail in a
        # backward pass that used to stop before it.
        train = (_trains(model) if layer is None else like.requires_grad) and not norm.frozen
        train = norm.weight.requires_grad if isinstance(norm.weight, nn.Parameter) else train
        gain = None if affine[0] is None else (affine[0] / times).to(like.dtype)
        if gain is not None and (not preserve or edit.gain_learns):  # else a constant, for which no activation is kept
            gain = nn.Parameter(gain, train)
        shifts = [norm.bias] if layer is None else [norm.bias, layer._parameters["bias"]]
        learns = [shift.requires_grad for shift in shifts if isinstance(shift, nn.Parameter)]
        learns = learns or [train and not norm.frozen]
        bias = nn.Parameter((affine[1] * unit).to(like.dtype), any(learns))
    if norm.drop is None and norm.act is None and gain is None and bias is None:
        if alpha is not None:
            return _skipinit(plan, module, model, alpha.channels)
        return Copy() if edit.copy else Vacant()
    scalar = None if alpha is None else _alpha_beside(plan, module, model)
    hooked = gain is not None or bias is not None or scalar is not None
    cls = CopiedAffine if edit.copy and hooked and not plan.inplace_activations else ChannelAffine
    copy = edit.copy and gain is None and bias is None
    channels = alpha.channels if alpha else None
    return cls(gain, bias, scalar, channels, norm.drop, norm.act, copy, plan.units.alpha, unit, times)


def _shell(module: nn.Module, out_of_place: bool) -> nn.Module:
    """Return a second object with the same contents, without hooks: the first is about to become something else."""
    shell, bare = type(module).__new__(type(module)), vars(nn.Module())
    shell.__dict__.update(module.__dict__ | {name: bare[name] for name in HOOKS})
    if out_of_place:
        shell.__dict__["inplace"] = False
    return shell


def _trains(model: nn.Module) -> bool:
    """Whether anything in the model learns; one without parameters has nothing that says otherwise."""
    return any(p.requires_grad for p in model.parameters()) or not any(True for _ in model.parameters())


def _skipinit(plan: Plan, module: nn.Module, model: nn.Module, channels: Channels) -> SkipInit:
    cls = SkipInit if plan.inplace_activations else CopiedSkipInit
    slot = cls(channels=channels, unit=plan.units.alpha)
    slot.raw_alpha = _alpha_beside(plan, module, model)
    return slot


def _alpha(plan: Plan, like: Tensor, requires_grad: bool) -> nn.Parameter:
    start = torch.full((1,), plan.alpha * plan.units.alpha, device=like.device, dtype=like.dtype)
    return nn.Parameter(start, requires_grad)


def _alpha_beside(plan: Plan, module: nn.Module, model: nn.Module) -> nn.Parameter:
    """Build an alpha that is like the module's own parameters: a frozen part of a model stays frozen."""
    return _alpha(plan, _like(module, model), _trains(module if any(True for _ in module.parameters()) else model))


def _like(*modules: nn.Module) -> Tensor:
    """Return a floating tensor of the first of these modules that holds one, for its device and dtype."""
    held = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    return next((tensor for tensor in held if tensor.is_floating_point()), torch.empty(0))
