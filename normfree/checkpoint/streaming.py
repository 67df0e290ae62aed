"""Conversion from file to file: planned without memory, and what stays as it is copied piece by piece.

A conversion computes with vectors only: those are read. Every larger tensor is a placeholder while the plan is applied
to the architecture, and is then written from the checkpoint, a piece at a time. The checkpoint is mapped into memory
anew for each piece, so that its pages do not pile up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from normfree import zoo
from normfree.checkpoint.saving import check_target, header_of, write
from normfree.errors import CheckpointError
from normfree.files import ANY, Choice, is_mapped, prefix_of, read_weights, reader, without_prefix
from normfree.layers import mean_of, shift
from normfree.options import Asked, Options
from normfree.planning.plan import look
from normfree.plans import PLAN_ATTRIBUTE, Plan
from normfree.rewriting.applying import rewrite
from normfree.tracing.trace import example_input
from normfree.training.initialization import Draw, draws, he_normal_, zero_biases_

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["convert_file"]

Read = Callable[[str], Tensor]
"""Reads a tensor of a checkpoint by its name."""
_SMALL = 2**12
"""Entries up to which tensors of several dimensions are read rather than streamed."""
_PIECE = 2**21
"""Bytes of a piece, at least; else the 32nd part of the checkpoint."""


def convert_file(
    source: str,
    checkpoint: str | Path,
    out: str | Path,
    *,
    num_classes: int | None = None,
    overwrite: bool = False,
    choice: Choice = ANY,
    tell: Callable[[str], None] = lambda _: None,
    size: int | None = None,
    **options: Unpack[Asked],
) -> Plan:
    """Convert a checkpoint into a file without holding the model in memory.

    The same bytes as from :func:`normfree.save` of the converted model.

    Args:
        source: The architecture, as :func:`normfree.zoo.find` reads it.
        checkpoint: Its weights, as :func:`normfree.files.read_state_dict` reads them.
        out: A ``.safetensors`` file, or a folder.
        num_classes: Width of its classifier, where it is not the default.
        overwrite: Replace an existing file.
        choice: Which entry of the checkpoint, and behind which prefix, its weights are.
        tell: Is told what was taken where there was a choice.
        size: Height and width of what the architecture is looked at on, if they are not to be found.
        options: As for :func:`normfree.convert`.

    Raises:
        NormfreeError: Whatever reading, planning or writing raises; nothing is written then.
    """
    check_target(out, overwrite=overwrite, inputs=(checkpoint,))
    found = zoo.find(source)
    state, note = read_weights(checkpoint, choice)
    tell(note)
    model = zoo.skeleton(found, num_classes=num_classes)
    prefix = prefix_of(model, state, checkpoint)
    tell(without_prefix(prefix, checkpoint))
    streamed = _fill(model, {key.removeprefix(prefix): value for key, value in state.items()})
    del state
    open_again = reader(Path(checkpoint), replace(choice, prefix=choice.prefix + prefix))
    if size is not None:
        options["inputs"] = example_input(model, size=size)
    made, met = look(model, Options(**options), loaded=True)
    layers = [(model.get_submodule(path), gain) for path, gain in made.drawn]
    drawn = draws(layers)
    zero_biases_(layers)
    rewrite(model, replace(made, reset=False), met(), scale=False)
    factors = _scaled(model, made, streamed, open_again)
    model.__dict__[PLAN_ATTRIBUTE] = made
    pieces = partial(_pieces, Path(checkpoint), open_again, streamed, drawn, factors)
    write(model, out, header_of(model, str(found), num_classes, made), overwrite=overwrite, pieces=pieces)
    return made


@torch.no_grad()
def _scaled(
    model: nn.Module, made: Plan, streamed: Mapping[int, str], open_again: Callable[[], Read]
) -> dict[int, float]:
    """Give carried layers units and constants; return the factor of each weight that is a placeholder, by its id."""
    factors = dict[int, float]()
    for carried in made.carried:
        layer: Any = model.get_submodule(carried.path)
        unit = float(1 / layer.gain[0]) if carried.head else carried.unit
        key = streamed.get(id(layer.weight))
        weight = layer.weight if key is None else open_again()(key).to(layer.weight.dtype)
        if layer.filter_mean is not None:
            layer.filter_mean = mean_of(weight * unit)
        if layer.center is not None:
            layer.at_center = shift(weight * unit, layer.center)
        if key is None:
            layer.weight.mul_(unit)
        else:
            factors[id(layer.weight)] = unit
    return factors


def _fill(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[int, str]:
    """Put vectors and placeholders into a skeleton; return the key in the checkpoint of each placeholder, by its id."""
    own = model.state_dict(keep_vars=True)  # kept, so that no other tensor gets one of their ids
    keys = {id(tensor): key for key, tensor in own.items() if key in weights}
    made: dict[int, Any] = {identity: _stand_in(own[key], weights[key]) for identity, key in keys.items()}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            held.update([(name, made[id(old)]) for name, old in held.items() if id(old) in made])
    return {id(new): keys[identity] for identity, new in made.items() if not _is_small(new)}


def _is_small(tensor: Tensor) -> bool:
    return tensor.dim() < 2 or tensor.numel() <= _SMALL


def _stand_in(old: Tensor, values: Tensor) -> Tensor:
    """Return a tensor of the type of another: with values if it is small, else of one number that is repeated."""
    new = values.to(old.dtype, copy=True) if _is_small(old) else torch.zeros((), dtype=old.dtype).expand(old.shape)
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


def _pieces(
    checkpoint: Path,
    open_again: Callable[[], Read],
    streamed: Mapping[int, str],
    drawn: Mapping[int, Draw],
    factors: Mapping[int, float],
    state: Mapping[str, Tensor],
    names: list[str],
) -> Iterator[Tensor]:
    """Yield the values of a file that is being written, flat, in the order of ``names``.

    The placeholders' values are in ``checkpoint``, under the keys that ``streamed`` knows, and are multiplied by
    ``factors``; but what is ``drawn`` is drawn anew.
    """

    def stamp() -> tuple[int, int, int]:
        found = checkpoint.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns

    budget = max(_PIECE, checkpoint.stat().st_size // 32)
    opened, used = stamp(), 0
    read, part = open_again(), torch.empty(0)
    for name in names:
        tensor, key = state[name].detach(), streamed.get(id(state[name]))
        draw = drawn.get(id(state[name]))
        if draw is not None:
            yield he_normal_(draw, torch.empty(tensor.shape, dtype=tensor.dtype)).reshape(-1)
            continue
        if key is None:
            yield tensor.contiguous().reshape(-1)
            continue
        flat = read(key).reshape(-1)
        step = max(1, budget // flat.itemsize)
        for start in range(0, tensor.numel(), step):
            if used >= budget and is_mapped(checkpoint):
                del read, flat, part  # nothing must hold the old pages
                read, used = open_again(), 0
                if stamp() != opened:
                    raise CheckpointError(f"{checkpoint}: the file changed while it was read")
                flat = read(key).reshape(-1)
            part = flat[start : start + step]
            used += part.numel() * part.itemsize
            yield part.to(tensor.dtype) * factors.get(id(state[name]), 1)
