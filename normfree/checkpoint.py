"""Save and load converted models: safetensors with the plan as JSON metadata; never a pickle."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from normfree.errors import CheckpointError, InternalError, UsageError
from normfree.files import check_output, replacing
from normfree.guards import PLAN_ATTRIBUTE
from normfree.plans import Plan
from normfree.reference import Reference
from normfree.rewriting import rewrite

__all__ = ["Header", "load", "read_header", "save"]

FORMAT = 1
_KEY = "normfree"


@dataclass(frozen=True)
class Header:
    """What a file says about itself.

    Attributes:
        plan: The plan that was applied.
        source: The architecture, as :func:`normfree.zoo.find` reads it, or ``None`` for one no zoo knows.
        num_classes: Width of its classifier where it is not the default.
        reference: Samples of what the original computed.
    """

    plan: Plan
    source: str | None
    num_classes: int | None
    reference: Reference | None


def save(
    model: nn.Module,
    path: str | Path,
    *,
    source: str | None = None,
    num_classes: int | None = None,
    plan: Plan | None = None,
    reference: Reference | None = None,
    overwrite: bool = False,
) -> None:
    """Save a converted model.

    Args:
        model: What :func:`normfree.convert` returned, trained or not.
        path: A ``.safetensors`` file. It is written beside and moved into place: never half a file.
        source: The architecture (``"timm:resnet50"``), so that :func:`load` can build it.
        num_classes: Width of its classifier, where it is not the architecture's default.
        plan: The plan that was applied, if ``model`` is a piece of what was converted.
        reference: Samples of what the original computed, for ``normfree verify``.
        overwrite: Replace an existing file.

    Raises:
        UsageError: The model carries no plan, or is fused.
        OutputError: The file exists, or cannot be written.

    Example:
        >>> import normfree, torchvision
        >>> model = normfree.convert(torchvision.models.resnet18())
        >>> normfree.save(model, "resnet18.safetensors", source="torchvision:resnet18")
        >>> normfree.load("resnet18.safetensors").layer1[0].conv2.alpha.item()
        0.0
    """
    plan = plan if plan is not None else getattr(model, PLAN_ATTRIBUTE, None)
    if plan is None:
        raise UsageError(f"this {type(model).__name__} was not converted by normfree: it carries no plan")
    if plan.fused:
        raise UsageError("a fused model cannot be loaded again: save the converted one, and fuse it after loading")
    out = check_output(path, overwrite=overwrite)
    header = {
        "format": FORMAT,
        "plan": json.loads(plan.to_json()),
        "source": source,
        "num_classes": num_classes,
        "reference": None if reference is None else reference.to_dict(),
        "torch": torch.__version__,
    }
    metadata = {"format": "pt", _KEY: json.dumps(header, separators=(",", ":"))}
    with replacing(out) as temporary:
        # save_model keeps one copy of tied weights, which a plain safetensors file cannot express.
        safetensors.torch.save_model(model, str(temporary), metadata)


def read_header(path: str | Path) -> Header:
    """Read what a file says about itself, without its tensors.

    Raises:
        CheckpointError: The file is missing, damaged, not one of ours, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error
    if _KEY not in metadata:
        raise CheckpointError(f"{path}: a safetensors file, but not one that normfree wrote; convert it first")
    try:
        raw: dict[str, Any] = json.loads(metadata[_KEY])
        version = int(raw["format"])
        if version > FORMAT:
            raise CheckpointError(f"{path}: format {version}, newer than the {FORMAT} known here; update normfree")
        return Header(
            plan=Plan.from_json(json.dumps(raw["plan"])),
            source=None if raw["source"] is None else str(raw["source"]),
            num_classes=None if raw["num_classes"] is None else int(raw["num_classes"]),
            reference=None if raw["reference"] is None else Reference.from_dict(raw["reference"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: normfree's header cannot be read: {error!r}") from error


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load a converted model: build the architecture, apply the stored plan, load the weights strictly.

    Args:
        path: A file that :func:`save` wrote.
        model: The original architecture with any weights, for what no zoo knows; it is converted in place.

    Raises:
        CheckpointError: The file is missing, damaged, not one of ours, or does not belong to the model.
        UsageError: The file names no architecture and no ``model`` is given.
    """
    header = read_header(path)
    if model is None:
        model = build_original(header, path)
    try:
        # The weights come from the file: drawing new ones first would only take time.
        rewrite(model, dataclasses.replace(header.plan, reset=False))
    except InternalError as error:
        raise CheckpointError(f"{path}: the stored plan does not fit this {type(model).__name__}: {error}") from error
    model.__dict__[PLAN_ATTRIBUTE] = header.plan
    _match_dtype(model, path)
    try:
        safetensors.torch.load_model(model, path, strict=True)
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: does not belong to this {type(model).__name__}: {error}") from error
    return model


def build_original(header: Header, path: str | Path, *, pretrained: bool = False) -> nn.Module:
    """Build the architecture that a file names, before its conversion."""
    from normfree import zoo

    if header.source is None:
        raise UsageError(f"{path} names no architecture: pass the original model, load(path, model=...)")
    return zoo.build(zoo.find(header.source), pretrained=pretrained, num_classes=header.num_classes)


def _match_dtype(model: nn.Module, path: str | Path) -> None:
    """A model saved in half precision comes back in half precision."""
    with safetensors.safe_open(path, framework="pt") as file:
        dtypes = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118  # not a mapping
    floating = {dtype for dtype in dtypes if dtype.is_floating_point}
    if len(floating) == 1:
        model.to(floating.pop())
