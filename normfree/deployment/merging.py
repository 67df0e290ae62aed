"""Parallel linear branches become one layer, in the way that their own library does it.

RepVGG, MobileOne and their kin bring a method that merges the branches of a block for inference; it reads norms. So a
copy of the block is given norms that do what gain and bias have come to, the method is called, and the result is taken
if it computes the same in float64.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normfree.code.functions import MERGING
from normfree.deployment.plain import scaled_like, trial_inputs, unscaled_output_
from normfree.edits import NormEdit
from normfree.layers import ChannelAffine, ScaledOutput, is_normfree
from normfree.plans import Plan
from normfree.rewriting.changing import become
from normfree.rewriting.comparing import error_between
from normfree.tracing.copying import deep_copy

__all__ = ["merge_"]

_TOLERANCE = 1e-9
"""Relative to the largest output."""


def merge_(model: nn.Module, plan: Plan, known: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """Merge every block that has a method for it, outermost first; return their names.

    Args:
        model: A model whose layers are plain again.
        plan: Its plan.
        known: The blocks that were merged before, for a model whose weights come from a file.
    """
    merged: list[str] = []
    for path, block in list(model.named_modules()):
        inside = any(path.startswith(f"{outer}.") for outer in merged)
        has_method = any(callable(getattr(block, name, None)) for name in MERGING)
        if path and not inside and (path in known if known is not None else has_method and _edits(path, plan)):
            made = _merged(path, block, plan, check=known is None)
            if made is not None:
                become(block, made)
                merged.append(path)
    return tuple(merged)


class _Doubled(TorchFunctionMode):
    """What a method makes is in float64 too: layers put their weights into ``torch.empty``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func is torch.empty and options.get("dtype") is None:
            options["dtype"] = torch.float64
        return func(*args, **options)


def _edits(path: str, plan: Plan) -> list[NormEdit]:
    return [edit for edit in plan.removed if edit.name.startswith(f"{path}.")]


@torch.no_grad()
def _merged(path: str, block: nn.Module, plan: Plan, *, check: bool) -> nn.Module | None:
    """Return what the block's own method makes of it, or ``None`` if that is something else."""
    like = next(block.parameters())
    before, copied = deep_copy(block).double().eval(), deep_copy(block).double().eval()
    scaled = isinstance(block, ScaledOutput)
    if scaled:
        unscaled_output_(before)
        unscaled_output_(copied)
    try:
        x, expected, widths = _run(before, [edit.name.removeprefix(f"{path}.") for edit in _edits(path, plan)])
        _give_norms(path, copied, plan, widths)
        method = next(name for name in MERGING if hasattr(copied, name))
        with torch.device(like.device), _Doubled():
            made: Any = getattr(copied, method)()
        made = made if isinstance(made, nn.Module) else copied
        if check and error_between([expected], [made(x)]) > _TOLERANCE:
            return None
    except Exception:  # whatever a method raises that expects another block
        return None
    made = made.to(like.dtype).train(block.training)
    for parameter in made.parameters():
        parameter.requires_grad_(like.requires_grad)
    if made is copied:
        _once_(made, method)
    if scaled:
        made = scaled_like(made, block)
    return made  # type: ignore[no-any-return]  # of a method that nobody has typed


def _once_(block: nn.Module, method: str) -> None:
    """Let a block's method do nothing from now on, if it asks for what it has taken away."""
    try:
        getattr(deep_copy(block), method)()
    except Exception:  # as above
        block.__dict__[method] = partial(bool)  # which pickles without us


def _run(block: nn.Module, slots: list[str]) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Return an input that a block takes, what it makes of it, and how many channels its slots see."""
    widths: dict[str, int] = {}
    for name in slots:
        block.get_submodule(name).register_forward_hook(lambda *io, name=name: widths.update({name: io[-1].shape[1]}))
    inner = [getattr(m, "in_channels", getattr(m, "in_features", None)) for m in block.modules()]
    inner += [len(slot.gain) for slot in block.modules() if isinstance(slot, ChannelAffine) and slot.gain is not None]
    for x in itertools.chain.from_iterable(map(trial_inputs, dict.fromkeys(filter(None, inner)))):
        given = x.to(next(block.parameters()).device)
        with contextlib.suppress(Exception):  # it takes another shape
            return given, block(given.clone()), widths
    raise ValueError("no input is known")


def _give_norms(path: str, block: nn.Module, plan: Plan, widths: Mapping[str, int]) -> None:
    """Put a norm into every slot, with what its producer or the slot itself adds and multiplies, if that is all."""
    modules = {f"{path}.{name}": module for name, module in block.named_modules(remove_duplicate=False)}
    norms: list[tuple[nn.Module, nn.Module]] = []
    for edit in _edits(path, plan):
        slot, layer = modules[edit.name], None if edit.producer is None else modules[edit.producer]
        more = [getattr(slot, name, None) for name in ("act", "drop", "raw_alpha")]
        if any(part is not None for part in more) or not isinstance(slot, (nn.Identity, ChannelAffine)):
            raise ValueError(f"{edit.name} does more than a norm")
        gain, bias = (getattr(slot, name, None) for name in ("gain", "bias"))
        if layer is not None:
            bias = layer._parameters["bias"]
            layer._parameters["bias"] = None
        width = widths[edit.name.removeprefix(f"{path}.")]
        norms.append((slot, _norm(edit, width, gain, bias, next(block.parameters()))))
    for slot, norm in norms:
        become(slot, norm)
    if any(map(is_normfree, block.modules())):
        raise ValueError("something is left that multiplies an activation")


def _norm(edit: NormEdit, width: int, gain: Tensor | None, bias: Tensor | None, like: Tensor) -> nn.Module:
    kind = next((getattr(nn, f"BatchNorm{n}d") for n in (1, 3) if f"{n}d" in edit.type), nn.BatchNorm2d)
    norm = kind(width, eps=0.0, device=like.device, dtype=like.dtype)
    for held, value in ((norm.weight, gain), (norm.bias, bias)):
        if value is not None:
            held.copy_(value)
    return norm.eval()
