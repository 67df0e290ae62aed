"""Reading checkpoints of others. Tensors are mapped into memory and not copied where their format allows it."""

from __future__ import annotations

import argparse
import datetime
import pathlib
import pickle
import re
import threading
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from normfree.errors import CheckpointError
from normfree.files.entries import ANY, Choice, pick

__all__ = ["ENDINGS", "is_mapped", "read_state_dict", "read_weights", "reader"]

_PICKLED = (".pth", ".pt", ".bin", ".tar", ".ckpt")
ENDINGS = (".safetensors", *_PICKLED)


def read_state_dict(path: str | Path, choice: Choice = ANY) -> dict[str, Tensor]:
    """Return the weights that :func:`read_weights` finds."""
    return read_weights(path, choice)[0]


def read_weights(path: str | Path, choice: Choice = ANY) -> tuple[dict[str, Tensor], str]:
    """Read the weights of a checkpoint, ``.safetensors`` or what ``torch.save`` wrote, with a note on which they are.

    They may be bare or under a key, averaged ones first, with or without the prefixes of DDP, ``torch.compile`` and
    ``AveragedModel``. Pickles are read with ``weights_only=True`` and in no other way.

    Args:
        path: The file.
        choice: Which entry, and behind which prefix, if the caller knows.

    Raises:
        CheckpointError: The file is missing, empty, truncated, no checkpoint, or would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty")
    if path.suffix not in ENDINGS:
        raise CheckpointError(f"{path}: unknown ending {path.suffix!r}; known: {' '.join(ENDINGS)}")
    raw = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path, size)
    return pick(raw, path, choice)


def reader(path: Path, choice: Choice = ANY) -> Callable[[], Callable[[str], Tensor]]:
    """Return what opens a checkpoint, as often as it is called; that returns what reads one tensor by its name.

    Once what reads is gone, and the tensors that it gave, the pages of the file that they took are free. Of
    safetensors only the header is read to open them: to read all tensors anew takes twenty times as long.

    Raises:
        CheckpointError: As :func:`read_state_dict`; so do both that are returned, should the file have changed.
    """
    if path.suffix != ".safetensors":
        return lambda: read_state_dict(path, choice).__getitem__
    raw = _read_safetensors(path)
    names = {id(tensor): name for name, tensor in raw.items()}
    stored = {key: names[id(tensor)] for key, tensor in pick(raw, path, choice)[0].items()}

    def opened() -> Callable[[str], Tensor]:
        file = _safetensors(path, lambda: safetensors.safe_open(path, framework="pt"))
        return lambda key: _safetensors(path, lambda: file.get_tensor(stored[key]))

    return opened


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
        with _ALLOWING, torch.serialization.safe_globals(_harmless()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        if any(sign in str(error) for sign in _FOREIGN):
            named = re.search(r"(?:GLOBAL|global:?|class) `?([\w.]+\.[\w.]+)", str(error))
            raise CheckpointError(
                f"{path}: reading this file would unpickle arbitrary objects, which can run any code; refused"
                f"{f' (found: {named[1]})' if named else ''}. Save its state_dict alone: "
                "torch.save(model.state_dict(), ...)"
            ) from error
        raise CheckpointError(f"{path}: not a checkpoint, or damaged: {error}") from error
    except Exception as error:  # torch.load raises whatever the damaged bytes lead it to
        raise CheckpointError(f"{path}: not a checkpoint, or damaged: {type(error).__name__}: {error}") from error


_ALLOWING = threading.Lock()  # what may be unpickled is a setting of the whole process


def _harmless() -> list[Any]:
    """Return what training scripts leave beside the weights and holds values only: arguments, paths, dates, numbers."""
    import numpy as np

    kinds = {type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"}
    rebuild = np.float64(0).__reduce__()[0]
    names = [f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")]  # before numpy 2, and since
    paths: list[Any] = []
    for kind in (pathlib.PurePosixPath, pathlib.PureWindowsPath):  # of any system, wherever it is read
        for module in ("pathlib", "pathlib._local"):  # before Python 3.13, and since
            paths += [(kind, f"{module}.{name}") for name in (kind.__name__, kind.__name__.removeprefix("Pure"))]
    plain = [argparse.Namespace, types.SimpleNamespace, datetime.datetime, datetime.date, datetime.timedelta]
    return [*plain, *paths, np.dtype, *kinds, *((rebuild, name) for name in names)]


def _check_archive(path: Path, size: int) -> None:
    """``torch.save`` compresses nothing: what would grow while it is read is no checkpoint."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(e.file_size for e in entries) > size:
        raise CheckpointError(f"{path}: damaged, or a compressed archive, which torch.save never writes; refused")


def is_mapped(path: Path) -> bool:
    """Whether reading this file costs no memory until its values are used; old pickles must be read at once."""
    return path.suffix == ".safetensors" or zipfile.is_zipfile(path)
