"""``save``: one file, or a folder in the layout of the Hugging Face Hub.

Before it writes, it asks whether ``load`` will be able to read that, and what it will have to be given.
"""

from __future__ import annotations

import base64
import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import safetensors.torch
from torch import Tensor, nn

from normfree.checkpoint.header import WEIGHTS, Header
from normfree.checkpoint.loading import applied_to_empty
from normfree.errors import CheckpointError, UsageError
from normfree.files import Pieces, check_fits, check_output, replacing, stored, write_state
from normfree.layers import ScaledWeight, is_normfree
from normfree.layers.reparametrized import check_plain
from normfree.plans import Plan
from normfree.proofs.reference import Reference
from normfree.rewriting.originals import ORIGINALS_ATTRIBUTE, Originals

__all__ = ["SaveWarning", "check_target", "header_of", "save", "write"]


class SaveWarning(UserWarning):
    """What is written can be loaded only with the original at hand."""


def save(
    model: nn.Module,
    path: str | Path,
    *,
    source: str | None = None,
    num_classes: int | None = None,
    plan: Plan | None = None,
    reference: Reference | None = None,
    input_size: tuple[int, ...] | None = None,
    overwrite: bool = False,
) -> None:
    """Save a converted or fused model.

    Args:
        model: What :func:`normfree.convert` or :func:`normfree.fuse` returned, trained or not.
        path: A ``.safetensors`` file, or a folder for the layout of the Hugging Face Hub: ``model.safetensors`` with
            timm's ``config.json`` beside it. Files are written beside and moved into place: never half a file.
        source: The architecture (``"timm:resnet50"``), so that :func:`load` can build it. Default: what timm's
            configuration of the model says. It is held to the model before anything is written.
        num_classes: Width of its classifier, where it is not the architecture's default; of timm's models it is known.
        plan: The plan that was applied, if ``model`` is a piece of what was converted.
        reference: Samples of what the original computed, for ``normfree verify``.
        input_size: Shape of one input that the model was made for, ``(C, *)``, for ``normfree export``. Default: what
            timm's configuration or torchvision's weights say.
        overwrite: Replace an existing file.

    Raises:
        UsageError: The model carries no plan, is not of the architecture that is named, or has a layer whose weight is
            pruned or parametrized.
        OutputError: The file exists, or cannot be written.

    Warns:
        SaveWarning: No architecture is known: :func:`load` will want ``model=``.

    Example:
        >>> import normfree, torchvision
        >>> model = normfree.convert(torchvision.models.resnet18())
        >>> normfree.save(model, "resnet18.safetensors", source="torchvision:resnet18")
        >>> normfree.load("resnet18.safetensors").layer1[0].conv2.alpha
        0.0
    """
    check_target(path, overwrite=overwrite)
    header = header_of(model, source, num_classes, plan, reference, input_size)
    header = _loadable(model, header, source, num_classes, stored(model)[0])
    write(model, path, header, overwrite=overwrite)


def header_of(
    model: nn.Module,
    source: str | None,
    num_classes: int | None,
    plan: Plan | None,
    reference: Reference | None = None,
    input_size: tuple[int, ...] | None = None,
) -> Header:
    """Return what the file is to say about itself; timm's configuration of a model says what the caller does not."""
    plan = plan if plan is not None else Plan.of(model)
    if not plan.fused:  # a head that was put on since the conversion is a plain layer
        carried = {name for name, module in model.named_modules() if isinstance(module, ScaledWeight)}
        plan = replace(plan, carried=tuple(layer for layer in plan.carried if layer.path in carried))
    originals: Originals | None = getattr(model, ORIGINALS_ATTRIBUTE, None)
    norms = None
    if originals is not None:
        tensors = {key: tensor.cpu().contiguous() for key, tensor in originals.tensors().items()}
        norms = base64.b64encode(safetensors.torch.save(tensors)).decode()
    config = getattr(model, "pretrained_cfg", None) or {}
    if source is None and config.get("architecture"):
        source = f"timm:{config['architecture']}"
    if num_classes is None and (source or "").startswith("timm:"):
        num_classes = getattr(model, "num_classes", None)
    size = input_size or config.get("input_size")
    return Header(plan, source, num_classes, reference, None if size is None else tuple(size), norms)


def _loadable(
    model: nn.Module, header: Header, source: str | None, num_classes: int | None, state: Mapping[str, Tensor]
) -> Header:
    """Return a header with which ``load`` builds this very model; the caller has said the source and the classes."""
    plan = header.plan
    touched = {edit.producer or "" for edit in plan.removed} | {*plan.biases, *(layer.path for layer in plan.carried)}
    touched |= {name for name, module in model.named_modules() if is_normfree(module)}
    check_plain(model, touched - {""}, "save")
    try:
        empty = applied_to_empty(header, header.source)
        hint = "if only the classifier differs, give its num_classes"
        check_fits(empty.state_dict(keep_vars=True), state, str(header.source), hint)
        return header
    except (CheckpointError, UsageError) as error:  # or none is named
        if source is not None:
            raise UsageError(f"load could not read this {type(model).__name__} as {source}: {error}") from error
    warnings.warn(
        f"no source= names the architecture of this {type(model).__name__}: to load the file, pass the "
        "original architecture, load(path, model=...)",
        SaveWarning,
        stacklevel=3,
    )
    return replace(header, source=None, num_classes=num_classes)


def write(
    model: nn.Module,
    path: str | Path,
    header: Header,
    *,
    overwrite: bool,
    converted: bool = True,
    pieces: Pieces | None = None,
) -> None:
    """Write the state of a model to a file or a folder, with its header if it is ``converted``."""
    out = check_target(path, overwrite=overwrite)
    state, aliases = stored(model)
    out.parent.mkdir(exist_ok=True)
    metadata = header.to_metadata() if converted else {"format": "pt"}
    write_state(out, state, {**metadata, **aliases}, pieces)
    if out != Path(path):
        _write_config(model, out.parent, header)


def _write_config(model: nn.Module, folder: Path, header: Header) -> None:
    """Write what timm and the Hub want to know: timm's own of its models, name and number of classes of others."""
    with replacing(folder / "config.json") as temporary:
        library, *_ = (header.source or "").partition(":")
        if isinstance(getattr(model, "pretrained_cfg", None), dict) and library in ("", "timm"):
            from timm.models._hub import save_config_for_hf

            save_config_for_hf(model, cast(Any, temporary))  # timm 1.0.20 opens a path, though it asks for text
        else:
            config = {"architecture": header.source or type(model).__name__, "num_classes": header.num_classes}
            temporary.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def check_target(path: str | Path, *, overwrite: bool, inputs: tuple[str | Path, ...] = ()) -> Path:
    """Return the file to be written: ``path`` itself, or the one in the folder that it names.

    Raises:
        OutputError: It cannot or must not be written.
        UsageError: It has another ending.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return check_output(path, overwrite=overwrite, inputs=inputs)
    if path.suffix and not path.is_dir():
        raise UsageError(f"{path}: the output is a safetensors file; end its name in .safetensors, or name a folder")
    check_output(path / WEIGHTS if path.is_dir() else path, overwrite=overwrite, inputs=inputs)
    return path / WEIGHTS
