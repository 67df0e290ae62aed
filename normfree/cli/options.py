"""The application, and the options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from normfree.cli.printing import note
from normfree.errors import UsageError

__all__ = [
    "CheckpointOption",
    "ClassesOption",
    "InitOption",
    "JsonOption",
    "PretrainedOption",
    "SourceArgument",
    "app",
    "build_original",
    "parse_alpha",
]

app = typer.Typer(
    help="Take the BatchNorm out of any PyTorch model: same class, same methods, SkipInit instead of normalisation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SourceArgument = Annotated[
    str, typer.Argument(help="torchvision:resnet50, timm:resnet50.a1_in1k, or a bare name found in one of them.")
]
CheckpointOption = Annotated[
    Path | None, typer.Option(help="Weights to load first: .safetensors .pth .pt .bin .tar", dir_okay=False)
]
PretrainedOption = Annotated[bool, typer.Option("--pretrained", help="Load the library's own weights first.")]
ClassesOption = Annotated[int | None, typer.Option(min=1, help="Number of classes of the checkpoint's classifier.")]
InitOption = Annotated[str, typer.Option(help="auto, skipinit (from scratch) or preserve (keep the function).")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def build_original(
    source: str, step: Any, checkpoint: Path | None = None, pretrained: bool = False, num_classes: int | None = None
) -> Any:
    """Build the model that is to be converted; return its unambiguous name with it."""
    from normfree import zoo
    from normfree.files import load_weights, read_state_dict

    found = zoo.find(source)
    if found.note:
        note(found.note)
    step(f"building {found}")
    # The checkpoint first: a file that cannot be read should not cost the time of building.
    state = None if checkpoint is None else read_state_dict(checkpoint)
    model = zoo.build(found, pretrained=pretrained and state is None, num_classes=num_classes)
    if state is not None and checkpoint is not None:
        load_weights(model, state, checkpoint)
    return str(found), model


def parse_alpha(text: str | None) -> float | str | None:
    """Read ``--alpha``.

    Raises:
        UsageError: It is no number and not ``rsqrt_depth``.
    """
    if text is None or text == "rsqrt_depth":
        return text
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"--alpha is {text!r}; it must be a number or rsqrt_depth") from None
