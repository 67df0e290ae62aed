"""Model names -> models: ``torchvision:resnet50``, ``timm:resnet50.a1_in1k``, or a bare name found in one of them."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import pkgutil
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normfree.errors import CheckpointError, SourceError, one_line

__all__ = ["Source", "build", "build_own", "find", "own_shape", "skeleton"]

Library = Literal["torchvision", "timm"]


@dataclass(frozen=True)
class Source:
    """A model name that one library knows.

    Attributes:
        library: Which one.
        name: The name there.
        note: What the caller should be told, if the name was ambiguous.
    """

    library: Library
    name: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.library}:{self.name}"


def find(text: str) -> Source:
    """Look a name up.

    Raises:
        SourceError: No library knows it; the message lists the nearest names.

    Example:
        >>> from normfree import zoo
        >>> str(zoo.find("timm:resnet50.a1_in1k"))
        'timm:resnet50.a1_in1k'
    """
    library, colon, name = text.partition(":") if ":" in text else ("", "", text)
    if colon and library not in _HAS:
        raise SourceError(f"unknown library {library!r}: write torchvision:NAME or timm:NAME")
    having = [known for known in _HAS if library in ("", known) and _HAS[known](name)]
    if not having:
        who = f"{library} has no" if colon else "neither torchvision nor timm has a"
        raise SourceError(f"{who} model {name!r}{_nearest(name, library)}")
    note = f"{name} is in torchvision and in timm: taking torchvision:{name}" if len(having) > 1 else ""
    return Source(having[0], name, note)


def _torchvision_names() -> list[str]:
    import torchvision

    return list(torchvision.models.list_models())


def _in_timm(name: str) -> bool:
    import timm

    return bool(timm.is_model(name))


_HAS: dict[Library, Callable[[str], bool]] = {
    "torchvision": lambda name: name in _torchvision_names(),
    "timm": _in_timm,
}


def _nearest(name: str, asked: str) -> str:
    """Say which names are alike: of the library that was asked, if that was said, or that the other has this one."""
    import timm

    other = next((library for library in _HAS if library != asked and _HAS[library](name)), None)
    if other is not None:
        return f"; {other} has: write {other}:{name}"
    names = {"torchvision": _torchvision_names(), "timm": list(timm.list_models())}
    known = names[asked] if asked else [*names["torchvision"], *names["timm"]]
    close = difflib.get_close_matches(name.partition(".")[0], known, n=3)
    return f"; did you mean {', '.join(dict.fromkeys(close))}?" if close else ""


def build(source: Source, *, pretrained: bool = False, num_classes: int | None = None) -> nn.Module:
    """Build the model.

    Args:
        source: What :func:`find` returned.
        pretrained: Load the library's default weights, from its cache or its hub.
        num_classes: Width of the classifier; the library's default if ``None``.

    Raises:
        SourceError: The library refuses these arguments.
        CheckpointError: The weights cannot be had.
    """
    options: dict[str, Any] = {} if num_classes is None else {"num_classes": num_classes}
    try:
        if source.library == "timm":
            import timm

            return timm.create_model(source.name, pretrained=pretrained, **options)  # type: ignore[no-any-return]
        import torchvision

        builder = torchvision.models.get_model_builder(source.name)
        options |= _torchvision_options(builder)
        return cast(nn.Module, builder(weights="DEFAULT" if pretrained else None, **options))
    except Exception as error:  # hub, cache and constructor errors of two libraries
        said = one_line(error).partition(". ")[0]
        if pretrained and isinstance(error, OSError):  # as those of a hub and of a connection are
            raise CheckpointError(f"the pretrained weights of {source} cannot be had: {said}") from error
        raise SourceError(f"{source} cannot be built: {said}") from error


def build_own(source: str, num_classes: int | None = None) -> nn.Module | None:
    """Build a model by what makes it, ``package.module:function``; return ``None`` if there is no such package.

    It runs code by its name: only for what a user types, never for what a file says.

    Raises:
        SourceError: There is no such function, or it makes no model.
    """
    module, _, name = source.partition(":")
    if not name or module in _HAS:
        return None
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` has it
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return None
    try:
        model = pkgutil.resolve_name(source)(**({} if num_classes is None else {"num_classes": num_classes}))
    except Exception as error:  # whatever somebody else's code raises
        raise SourceError(f"{source} cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise SourceError(f"{source} returns a {type(model).__name__}, and no torch.nn.Module")
    return model


def skeleton(source: Source, *, num_classes: int | None = None) -> nn.Module:
    """Build the model as :func:`build` does, but with its large tensors on the meta device: without memory or values.

    Only what ``torch.empty`` makes goes there, and that is where layers put their weights: constructors also compute
    with small tensors of their own, which need values (torchvision's RegNet its widths).

    Raises:
        SourceError: As there.
    """
    try:
        with _EmptyOnMeta():
            return build(source, num_classes=num_classes)
    except SourceError:  # a few run a forward pass, or compute with weights; another reason is met again
        return build(source, num_classes=num_classes)


class _EmptyOnMeta(TorchFunctionMode):
    """Of one thread only, unlike a patched ``torch.empty``."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.empty and options.get("device") is None:
            options["device"] = "meta"
        if func in _FILLS and args and args[0].is_meta:
            return args[0]  # torch would compute the shape of the result, in Python
        return func(*args, **options)


_FILLS = (Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_)


def _torchvision_options(builder: Any) -> dict[str, Any]:
    """Say what would otherwise be downloaded or warned about."""
    options: dict[str, Any] = {}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None
    made = typing.get_type_hints(inspect.unwrap(builder)).get("return")
    # The quantizable classes pass it on to the parent that has it in its signature.
    parents = (inspect.signature(cls.__init__).parameters.get("init_weights") for cls in getattr(made, "__mro__", ()))
    if any(init is not None and init.default is None for init in parents):
        options["init_weights"] = True
    return options


def own_shape(model: nn.Module, source: Source | None = None) -> tuple[int, ...] | None:
    """Return the shape of one input that a model was made for, ``(C, *)``, or ``None`` where nobody says it.

    timm says it in the model's configuration, torchvision in the transforms of its weights; of a torchvision model
    without its name, all those of its class must agree.
    """
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict) and config.get("input_size"):
        return tuple(config["input_size"])
    names = [source.name] if source is not None and source.library == "torchvision" else []
    if not names and type(model).__module__.startswith("torchvision.models."):
        import torchvision

        builders = {name: inspect.unwrap(torchvision.models.get_model_builder(name)) for name in _torchvision_names()}
        names = [name for name, builder in builders.items() if typing.get_type_hints(builder)["return"] is type(model)]
    shapes = {_trained_on(name) for name in names}
    return shapes.pop() if len(shapes) == 1 else None


def _trained_on(name: str) -> tuple[int, ...] | None:
    """Return the shape of an image after the transforms of a torchvision network's default weights."""
    import torchvision

    weights = list(torchvision.models.get_model_weights(name))
    transforms = weights[0].transforms() if weights else None
    size = getattr(transforms, "crop_size", None)
    return (3, size[0], size[0]) if size is not None and len(size) == 1 else None
