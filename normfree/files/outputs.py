"""Where files go: refused before any work is done, or moved into place once they are whole."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import safetensors

from normfree.errors import OutputError

__all__ = ["check_output", "replacing"]


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
