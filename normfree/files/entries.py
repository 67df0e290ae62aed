"""Where in a checkpoint the weights are: under which key, and behind which prefix. Frameworks do not agree.

Averaged weights come first, as timm takes them. A choice is never made in silence: what was taken is said, and what
else there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normfree.errors import CheckpointError, some

__all__ = ["ANY", "Choice", "pick", "shared_prefix"]

_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "params_ema", "ema_model", "ema")
_KNOWN = (*_AVERAGED, "state_dict", "model_state_dict", "model", "params", "net", "network", "module")


@dataclass(frozen=True)
class Choice:
    """What a caller says of where the weights are.

    Attributes:
        key: The entry, ``"ema"`` or ``"ema.module"``; found if ``None``.
        prefix: Only names that begin with it are taken, and without it.
    """

    key: str | None = None
    prefix: str = ""


ANY = Choice()
"""What is there decides."""


def pick(raw: Any, where: object, choice: Choice = ANY) -> tuple[dict[str, Tensor], str]:
    """Return the weights in what a file holds, and which they are, for the user; empty where there was no choice.

    Raises:
        CheckpointError: There are none, or nobody can tell which; what was found is listed.
    """
    entries = dict(_entries(raw))
    key = _chosen(raw, entries, where, choice.key)
    others = [name for name in entries if name and name != key]
    note = f"{where}: took the weights under {key!r}" if key else ""
    note += f"; also there: {some(others)} (--key)" if key and others else ""
    return _cleaned(entries[key], where, choice.prefix), note


def _entries(raw: Any) -> Iterator[tuple[str, Mapping[Any, Tensor]]]:
    """Yield what holds nothing but tensors: the whole, its entries, and theirs."""
    if _is_state(raw):
        yield "", raw
        return
    for name, value in raw.items() if isinstance(raw, Mapping) else ():
        if _is_state(value):
            yield str(name), value
        elif isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", below) for inner, below in value.items() if _is_state(below))


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(item, Tensor) for item in value.values())


def _chosen(raw: Any, entries: Mapping[str, Any], where: object, key: str | None) -> str:
    if key is not None and key in entries:
        return key
    known = [name for first in _KNOWN for name in entries if name.partition(".")[0] == first]
    if key is None and (known or len(entries) == 1):
        return (known or [*entries])[0]
    kinds = [str(name)[:100] for name in raw] if isinstance(raw, Mapping) else [type(raw).__name__]
    found = ", ".join(name[:100] or "the whole file" for name in [*entries][:9]) or f"only {', '.join(kinds)[:200]}"
    if key is None and entries:
        raise CheckpointError(f"{where}: holds several state dicts; say which one by --key (found: {found})")
    raise CheckpointError(f"{where}: holds no state dict{'' if key is None else f' {key!r}'} (found: {found})")


def _cleaned(raw: Mapping[Any, Tensor], where: object, prefix: str) -> dict[str, Tensor]:
    from timm.models import clean_state_dict

    for key, value in raw.items():
        plain = value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
        if not (plain and isinstance(key, str)):
            what = "not plain tensors in memory (sparse, quantised, without values)"
            raise CheckpointError(f"{where}: {what}: {str(key)[:100]}")
    # torch's AveragedModel counts what it has averaged, beside what it holds under ``module.``
    counted = {key: v for key, v in raw.items() if key != "n_averaged" or len(raw) == 1}
    # torch.compile around DDP: older timm takes these two prefixes off in the other order only.
    state: dict[str, Tensor] = clean_state_dict({key.removeprefix("_orig_mod."): v for key, v in counted.items()})
    if len(state) != len(counted):
        raise CheckpointError(f"{where}: some keys are the same once the prefixes of DDP and torch.compile are gone")
    behind = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not behind:
        first = some(list(dict.fromkeys(key.partition(".")[0] + "." for key in state)))
        raise CheckpointError(f"{where}: no name begins with --prefix {prefix!r} (found: {first})")
    return behind


def shared_prefix(own: Mapping[str, Any], found: Mapping[str, Any], *, by_all: bool = True) -> str:
    """Return what stands before the names of a model in a file that has none of them as they are.

    Args:
        own: The names of the model.
        found: The names in the file.
        by_all: Only a prefix that all names in the file share; else one that others may lack.
    """
    if not found or any(key in own for key in found):
        return ""
    ends = tuple(f".{name}" for name in own)
    parts = next((key for key in found if by_all or key.endswith(ends)), "").split(".")
    for count in range(1, len(parts)):
        prefix = ".".join(parts[:count]) + "."
        behind = [key.removeprefix(prefix) for key in found if key.startswith(prefix)]
        if (len(behind) == len(found) or not by_all) and any(key in own for key in behind):
            return prefix
    return ""
