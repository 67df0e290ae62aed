"""Writing: outputs are refused before any work is done, and moved into place once they are whole.

Safetensors are written piece by piece, always the same bytes for the same content.

The library's own writer wants all tensors at once, and spells the metadata in another order each time. Its format is
small: the length of a header, the header as JSON, and the tensors one after the other
(https://github.com/huggingface/safetensors#format). They come in the library's order: larger types
first, then by name.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from normfree.errors import InternalError, OutputError, UsageError

__all__ = ["Pieces", "check_output", "replacing", "stored", "write_state"]

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
Pieces = Callable[[Mapping[str, Tensor], list[str]], Iterable[Tensor]]
"""Given a state and its names in the order of the file, yields their values: flat, each whole or in parts."""


def stored(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what a file holds of a model: each tensor under its first name, and further names with that one.

    Raises:
        UsageError: The state holds something that no file can.
    """
    state: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or tensor.is_meta or tensor.dtype not in _TYPES:
            kind = f"{tensor.dtype} on {tensor.device}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UsageError(f"{name} of this {type(model).__name__} cannot be written: it is {kind}")
        known = first.setdefault(id(tensor), name)
        if known == name:
            state[name] = tensor
        else:
            aliases[name] = known
    return state, aliases


def write_state(
    path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str], pieces: Pieces | None = None
) -> None:
    """Write ``state`` beside ``path`` and move it into place.

    Args:
        path: Where to.
        state: Names, shapes and types, and the values where ``pieces`` does not give them.
        metadata: Text to go with them.
        pieces: Where the values come from.

    Raises:
        OutputError: Writing failed. Whatever was at ``path`` is still there.
    """
    names = sorted(state, key=lambda name: (-state[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        start, end = end, end + state[name].numel() * state[name].itemsize
        kind, shape = _TYPES[state[name].dtype], list(state[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for piece in (_values if pieces is None else pieces)(state, names):
            file.write(piece.view(torch.uint8).numpy().data)
            del piece  # before the next one is made: it may be all that holds pages of a mapped file
        if file.tell() != 8 + len(text) + end:
            raise InternalError(f"{path}: {file.tell()} bytes were written where {8 + len(text) + end} were announced")


def _values(state: Mapping[str, Tensor], names: Iterable[str]) -> Iterator[Tensor]:
    for name in names:
        yield state[name].detach().cpu().contiguous().reshape(-1)


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
        with contextlib.suppress(OSError):  # the folder may have become unwritable: the first error tells
            temporary.unlink(missing_ok=True)
