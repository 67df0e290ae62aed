"""Reading checkpoints of others and writing files without ever leaving half of one."""

from __future__ import annotations

import contextlib
import os
import pickle
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from normfree.errors import CheckpointError, OutputError

__all__ = ["check_output", "load_weights", "read_state_dict", "replacing"]

_PICKLED = (".pth", ".pt", ".bin", ".tar")
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # averaged weights first, as timm does


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a checkpoint: ``.safetensors``, or what ``torch.save`` wrote.

    The weights may be bare or under ``state_dict``, ``model``, ``model_ema`` or ``state_dict_ema``, with or without
    the prefixes of DDP and ``torch.compile``. Pickles are read with ``weights_only=True`` and in no other way.

    Raises:
        CheckpointError: The file is missing, empty, truncated, no checkpoint, or would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty")
    if path.suffix not in (".safetensors", *_PICKLED):
        raise CheckpointError(f"{path}: unknown ending {path.suffix!r}; known: .safetensors {' '.join(_PICKLED)}")
    raw = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    return _clean(raw, path)


def _read_safetensors(path: Path) -> Any:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error


# How torch's restricted unpickler words what it will not construct or call.
_FOREIGN = ("Unsupported global", "Unsupported class", "unrecognized function", "not an allowed global")


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if any(sign in str(error) for sign in _FOREIGN):
            raise CheckpointError(
                f"{path}: reading this file would unpickle arbitrary objects, which can run any code; refused. "
                "Save its state_dict alone: torch.save(model.state_dict(), ...)"
            ) from error
        raise CheckpointError(f"{path}: not a checkpoint, or damaged: {error}") from error
    except Exception as error:  # torch.load raises whatever the damaged bytes lead it to
        raise CheckpointError(f"{path}: not a checkpoint, or damaged: {type(error).__name__}: {error}") from error


def _clean(raw: Any, path: Path) -> dict[str, Tensor]:
    from timm.models import clean_state_dict

    for key in _WRAPPERS:
        if isinstance(raw, Mapping) and isinstance(raw.get(key), Mapping):
            raw = raw[key]
            break
    if not isinstance(raw, Mapping) or not raw or not all(isinstance(v, Tensor) for v in raw.values()):
        kinds = ", ".join(map(str, raw)) if isinstance(raw, Mapping) else type(raw).__name__
        raise CheckpointError(f"{path}: holds no state dict (found: {kinds[:200]})")
    cleaned: dict[str, Tensor] = clean_state_dict(dict(raw))
    return cleaned


def load_weights(model: nn.Module, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load ``state`` into ``model``, strictly; batch counters, which old files lack, aside.

    Raises:
        CheckpointError: Keys or shapes differ; the first of each kind are listed and nothing is loaded.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} is {tuple(state[key].shape)}, the model wants {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    lines = [
        f"  {what}: {', '.join(found[:5])}" + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        for what, found in (("missing", missing), ("unexpected", unexpected), ("other shapes", shapes))
        if found
    ]
    if lines:
        hint = "\n  if only the classifier differs, give its number of classes" if len(shapes) in (1, 2) else ""
        raise CheckpointError(
            f"{path}: the checkpoint is not one of this {type(model).__name__}:\n" + "\n".join(lines) + hint
        )
    model.load_state_dict(dict(state), strict=False)


def check_output(path: str | Path, *, overwrite: bool, inputs: tuple[str | Path, ...] = ()) -> Path:
    """Refuse an output that cannot or must not be written, before any work is done.

    Raises:
        OutputError: The file exists, is one of the inputs, or its folder is missing or not writable.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise OutputError(f"{path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file")
    for other in map(Path, inputs):
        if path.exists() and other.exists() and path.samefile(other):
            raise OutputError(f"{path} is the input: the output needs a name of its own")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already; say --force (overwrite=True) to replace it")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path}: the folder {path.parent} is not writable")
    return path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside ``path``, and move it there if all went well; else remove it.

    Raises:
        OutputError: Writing failed (disk full, permission lost). Whatever was at ``path`` is still there.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise OutputError(f"{path}: cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
