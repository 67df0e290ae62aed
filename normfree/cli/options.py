"""The application, and the options that several commands share."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import normfree
from normfree.cli.printing import note, quiet
from normfree.errors import UsageError, require

__all__ = ["CheckpointOption", "ClassesOption", "InitOption", "JsonOption", "KeyOption", "Loaded", "OwnSourceArgument"]
__all__ += ["PlotOption", "PrefixOption", "PretrainedOption", "SizeOption", "SourceArgument"]
__all__ += ["app", "build_original", "check_written", "parse_alpha"]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)  # which breaks no name


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(normfree.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[  # its callback has answered by then
        bool, typer.Option("--version", help="Print the version.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """Take the BatchNorm out of any PyTorch model: same class, same methods, SkipInit instead of normalisation."""


SourceArgument = Annotated[
    str, typer.Argument(metavar="SOURCE", help="torchvision:NAME, timm:NAME, or a bare name that one has.")
]
OwnSourceArgument = Annotated[
    str, typer.Argument(metavar="SOURCE", help="torchvision:NAME, timm:NAME, NAME, or your package.module:function.")
]
CheckpointOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Weights to load first.", dir_okay=False)]
KeyOption = Annotated[str | None, typer.Option(metavar="KEY", help="Entry that holds them, as in ema.module.")]
PrefixOption = Annotated[str, typer.Option(metavar="TEXT", help="Take only names that begin so, as in backbone.")]
PretrainedOption = Annotated[bool, typer.Option("--pretrained", help="Load the library's own weights first.")]
ClassesOption = Annotated[int | None, typer.Option(min=1, metavar="N", help="Number of classes of the classifier.")]
InitOption = Annotated[str, typer.Option(metavar="INIT", help="auto, skipinit or preserve.")]
SizeOption = Annotated[int | None, typer.Option(min=1, metavar="N", help="Height and width; found by default.")]
PlotOption = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it: .png, .svg, .pdf", dir_okay=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@dataclass(frozen=True)
class Loaded:
    """Which weights a model is to have: a checkpoint's, or the library's own.

    Attributes:
        checkpoint: The file.
        key: Its entry.
        prefix: What its names begin with.
        pretrained: Whether the library's own are taken.
    """

    checkpoint: Path | None = None
    key: str | None = None
    prefix: str = ""
    pretrained: bool = False

    def __bool__(self) -> bool:
        return self.pretrained or self.checkpoint is not None

    def read(self) -> Any:
        """Read the checkpoint, if there is one, and say what was taken of it."""
        from normfree.files import Choice, read_weights

        if self.checkpoint is None:
            return None
        state, taken = read_weights(self.checkpoint, Choice(self.key, self.prefix))
        note(taken)
        return state

    def give(self, model: Any, state: Any) -> None:
        """Load what was read into a model."""
        from normfree.files import load_weights, without_prefix

        if self.checkpoint is not None:
            prefix = load_weights(model, state, self.checkpoint)
            note(without_prefix(prefix, self.checkpoint))


def build_original(
    source: str, step: Any, loaded: Loaded = Loaded(), num_classes: int | None = None, *, own: bool = False
) -> Any:
    """Build the model that is to be converted; return its unambiguous name with it.

    With ``own`` it may be the user's: ``package.module:function``.
    """
    from normfree import zoo

    library = source.partition(":")[0]
    if not own and ":" in source and library not in ("torchvision", "timm"):
        raise UsageError(
            f"{source} is no model of torchvision or timm, and a file must say what it is of. `inspect`, `signals` and "
            "`bench` take package.module:function; in Python normfree.convert and normfree.save take any model"
        )
    if Path(source).is_file():
        raise UsageError(
            f"{source} is a file: name the architecture that it is of, and give the file by --checkpoint. `verify`, "
            "`fuse`, `restore` and `export` read what normfree wrote"
        )
    with contextlib.redirect_stdout(sys.stderr):  # whatever it prints
        model = zoo.build_own(source, num_classes) if own else None
    if model is not None:
        if loaded.pretrained:
            raise UsageError(f"--pretrained is for models of torchvision and timm; {source} brings its own weights")
        loaded.give(model, loaded.read())
        return source, model
    found = zoo.find(source)
    note(found.note)
    step(f"building {found}")
    # The checkpoint first: a file that cannot be read should not cost the time of building.
    state = loaded.read()
    with quiet():
        model = zoo.build(found, pretrained=loaded.pretrained and state is None, num_classes=num_classes)
    loaded.give(model, state)
    return str(found), model


def check_written(csv: Path | None = None, plot: Path | None = None) -> None:
    """Refuse files that could not be written, before anything is measured.

    Raises:
        UsageError: A folder is not there; matplotlib is missing, or knows no such ending.
    """
    if plot is not None:
        require("matplotlib", "plot")
        from matplotlib.figure import Figure

        known = sorted(Figure().canvas.get_supported_filetypes())
        if plot.suffix.removeprefix(".").lower() not in known:
            raise UsageError(f"--plot {plot}: a picture ends in one of {' '.join(f'.{ending}' for ending in known)}")
    for path in filter(None, (plot, csv)):
        from normfree.files import check_output

        check_output(path, overwrite=True)


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
