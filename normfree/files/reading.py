"""Reading checkpoints of others. Tensors are mapped into memory and not copied where their format allows it."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from normfree.errors import CheckpointError

__all__ = ["ENDINGS", "is_mapped", "read_state_dict", "reader"]

_PICKLED = (".pth", ".pt", ".bin", ".tar")
ENDINGS = (".safetensors", *_PICKLED)
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
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty")
    if path.suffix not in ENDINGS:
        raise CheckpointError(f"{path}: unknown ending {path.suffix!r}; known: {' '.join(ENDINGS)}")
    raw = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path, size)
    return _clean(raw, path)


def reader(path: Path) -> Callable[[], Callable[[str], Tensor]]:
    """Return what opens a checkpoint, as often as it is called; that returns what reads one tensor by its name.

    Once what reads is gone, and the tensors that it gave, the pages of the file that they took are free. Of
    safetensors only the header is read to open them: to read all tensors anew takes twenty times as long.

    Raises:
        CheckpointError: As :func:`read_state_dict`; so do both that are returned, should the file have changed.
    """
    if path.suffix != ".safetensors":
        return lambda: read_state_dict(path).__getitem__
    raw = _read_safetensors(path)
    names = {id(tensor): name for name, tensor in raw.items()}
    stored = {key: names[id(tensor)] for key, tensor in _clean(raw, path).items()}
    return lambda: _reading_one(path, stored)


def _reading_one(path: Path, stored: Mapping[str, str]) -> Callable[[str], Tensor]:
    file = _safetensors(path, lambda: safetensors.safe_open(path, framework="pt"))
    return lambda key: _safetensors(path, lambda: file.get_tensor(stored[key]))


def _read_safetensors(path: Path) -> Any:
    return _safetensors(path, lambda: safetensors.torch.load_file(path))


def _safetensors(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # the library raises errors of its own, of Rust, of torch and of Python
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error


# How torch's restricted unpickler words what it will not construct or call.
_FOREIGN = ("Unsupported global", "Unsupported class", "unrecognized function", "not an allowed global")


def _read_pickle(path: Path, size: int) -> Any:
    try:
        archive = zipfile.is_zipfile(path)
        if archive:
            _check_archive(path, size)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        if any(sign in str(error) for sign in _FOREIGN):
            raise CheckpointError(
                f"{path}: reading this file would unpickle arbitrary objects, which can run any code; refused. "
                "Save its state_dict alone: torch.save(model.state_dict(), ...)"
            ) from error
        raise CheckpointError(f"{path}: not a checkpoint, or damaged: {error}") from error
    except Exception as error:  # torch.load raises whatever the damaged bytes lead it to
        raise CheckpointError(f"{path}: not a checkpoint, or damaged: {type(error).__name__}: {error}") from error


def _check_archive(path: Path, size: int) -> None:
    """``torch.save`` compresses nothing: what would grow while it is read is no checkpoint."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(e.file_size for e in entries) > size:
        raise CheckpointError(f"{path}: damaged, or a compressed archive, which torch.save never writes; refused")


def is_mapped(path: Path) -> bool:
    """Whether reading this file costs no memory until its values are used; old pickles must be read at once."""
    return path.suffix == ".safetensors" or zipfile.is_zipfile(path)


def _clean(raw: Any, path: Path) -> dict[str, Tensor]:
    from timm.models import clean_state_dict

    for key in _WRAPPERS:
        if isinstance(raw, Mapping) and isinstance(raw.get(key), Mapping):
            raw = raw[key]
            break
    if not isinstance(raw, Mapping) or not raw or not all(isinstance(v, Tensor) for v in raw.values()):
        kinds = ", ".join(str(key)[:100] for key in raw) if isinstance(raw, Mapping) else type(raw).__name__
        raise CheckpointError(f"{path}: holds no state dict (found: {kinds[:200]})")
    names = [str(key)[:100] for key, value in raw.items() if not (isinstance(key, str) and _is_plain(value))]
    if names:
        raise CheckpointError(f"{path}: not plain tensors in memory (sparse, quantised, without values): {names[0]}")
    # torch.compile around DDP: older timm takes these two prefixes off in the other order only.
    cleaned: dict[str, Tensor] = clean_state_dict({key.removeprefix("_orig_mod."): v for key, v in raw.items()})
    if len(cleaned) != len(raw):
        raise CheckpointError(f"{path}: some keys are the same once the prefixes of DDP and torch.compile are gone")
    return cleaned


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
