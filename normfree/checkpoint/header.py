"""What a file says about itself: the plan, the architecture, the versions, and the norms that it can give back."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

import normfree
from normfree.errors import CheckpointError, UsageError
from normfree.files.typed_json import from_plain
from normfree.plans import Plan
from normfree.proofs.reference import Reference

__all__ = ["FORMAT", "Header", "read_header", "read_plan", "weights_in"]

FORMAT = 7
"""Since 7 the slot of a norm holds gain, bias and alpha, which were on the layer in front of it; files of earlier forms
are refused."""
_KEY, _NORMS = "normfree", "normfree.norms"
WEIGHTS = "model.safetensors"
"""Their name in a folder, by the convention of the Hugging Face Hub."""


@dataclass(frozen=True)
class Header:
    """What a file says about itself.

    Attributes:
        plan: The plan that was applied.
        source: The architecture, as :func:`normfree.zoo.find` reads it, or ``None`` for one no zoo knows.
        num_classes: Width of its classifier where it is not the default.
        reference: Samples of what the original computed.
        input_size: Shape of one input, ``(C, *)``, where it is known.
        norms: Tensors of the norms that were taken away, and of the biases, as a small safetensors file in base64.
    """

    plan: Plan
    source: str | None = None
    num_classes: int | None = None
    reference: Reference | None = None
    input_size: tuple[int, ...] | None = None
    norms: str | None = None

    def to_metadata(self) -> dict[str, str]:
        """Return it as the metadata of a safetensors file."""
        libraries = ["torch"] if self.source is None else ["torch", self.source.partition(":")[0]]
        versions = {"normfree": normfree.__version__} | {name: metadata.version(name) for name in libraries}
        raw = {"format": FORMAT, **asdict(self), "versions": versions}
        norms = raw.pop("norms")
        kept = {} if norms is None else {_NORMS: norms}
        return {"format": "pt", _KEY: json.dumps(raw, separators=(",", ":")), **kept}

    def kept(self, where: object) -> Mapping[str, Tensor] | None:
        """Return the tensors of the norms.

        Raises:
            CheckpointError: They cannot be read.
        """
        if self.norms is None:
            return None
        try:
            return safetensors.torch.load(base64.b64decode(self.norms, validate=True))
        except Exception as error:  # as in reading: whatever damaged bytes lead to
            raise CheckpointError(f"{where}: the norms that are kept in it cannot be read: {error}") from error


def weights_in(path: str | Path) -> Path:
    """Return the file with the weights: itself, or the one in a folder."""
    return Path(path) / WEIGHTS if Path(path).is_dir() else Path(path)


def read_header(path: str | Path) -> Header:
    """Read what a file, or the folder it lies in, says about itself, without its tensors.

    Raises:
        CheckpointError: The file is missing, damaged, not one of ours, or of a newer format.
    """
    path = weights_in(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
    except Exception as error:  # the library raises errors of its own, of Rust, of torch and of Python
        what = f"{path}: not a readable safetensors file; a checkpoint of another kind is converted first (convert)"
        raise CheckpointError(f"{what}: {error}") from error
    if _KEY not in found:
        raise CheckpointError(f"{path}: a safetensors file, but not one that normfree wrote; convert it first")
    try:
        raw: dict[str, Any] = json.loads(found[_KEY])
        version = int(raw["format"])
        if version > FORMAT:
            written = dict(raw.get("versions") or {}).get("normfree", "a newer one")
            raise CheckpointError(
                f"{path}: format {version} of normfree {written}, newer than the {FORMAT} known here; update normfree"
            )
        if version < FORMAT:
            raise CheckpointError(
                f"{path}: format {version}, in which gain and bias were on the layers in front of the slots; this "
                f"version reads format {FORMAT}: convert the original again, or use the version that wrote the file"
            )
        fields = {name: raw.get(name) for name in ("source", "num_classes", "reference", "input_size")}
        fields["norms"] = found.get(_NORMS)
        header: Header = from_plain(Header, {"plan": raw["plan"], **fields})
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: normfree's header cannot be read: {error}") from error
    return header


def read_plan(text: str | Path) -> Plan:
    """Return the plan in a text, in a text file, or in a file or folder that normfree wrote.

    Raises:
        CheckpointError: There is none.
        UsageError: It is of another type.
    """
    if isinstance(text, str) and text.lstrip().startswith("{"):
        return Plan.from_json(text)
    if not isinstance(text, str | Path):
        raise UsageError(f"plan is a {type(text).__name__}; it must be a Plan, its JSON, or a path")
    path = Path(text)
    if path.is_dir() or path.suffix == ".safetensors":
        return read_header(path).plan
    try:
        return Plan.from_json(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no plan can be read there: {error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
