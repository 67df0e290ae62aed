"""What a model is run on: the forms in which a caller hands it over, and what to try where he does not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Guess", "Inputs", "arguments", "fresh", "guesses", "tensors"]

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]


@dataclass(frozen=True)
class Guess:
    """Arguments that a model may take, and what says so. Tensors are on the meta device: only their shapes count."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    how: str

    def __str__(self) -> str:
        shapes = [str(tuple(tensor.shape)) for tensor in tensors((self.args, self.kwargs))]
        return f"{' and '.join(dict.fromkeys(shapes))}, {self.how}"

    def real(self, like: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return arguments with values, on the device of ``like``: white noise, or ones where numbers are counted."""
        generator = torch.Generator().manual_seed(0)

        def drawn(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.is_meta:
                return leaf
            if not leaf.is_floating_point():
                return torch.ones(leaf.shape, dtype=leaf.dtype, device=like.device)
            noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
            return noise.to(like.device, leaf.dtype)

        args, kwargs = tree_map(drawn, (self.args, dict(self.kwargs)))
        return args, kwargs


def arguments(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def fresh(x: Any) -> Any:
    """Return a copy of every tensor in any nesting: a model may write into its input."""
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, x)


def tensors(value: object) -> list[Tensor]:
    """Return the tensors in any nesting of lists, dicts, tuples and plain objects, in order."""
    found: list[Tensor] = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif not isinstance(leaf, (nn.Module, type)) and getattr(leaf, "__dict__", None):
            found.extend(tensors(list(vars(leaf).values())))
    return found


def guesses(model: nn.Module, batch: int = 2, size: int | None = None, *, small: bool = False) -> Iterator[Guess]:
    """Yield what the model may take, likely things first, and small ones for whoever is about to compute with them."""
    yield from _of_detector(model, batch if small else 1)
    name = getattr(model, "main_input_name", None)
    named = isinstance(name, str) and name not in ("input_ids", "inputs_embeds")
    count, keywords = (0, [str(name)]) if named else _required(model)
    for shape, how in _shapes(model, small):
        x = _empty(model, batch, *(shape if size is None else (shape[0], *(size for _ in shape[1:]))))
        yield Guess((x,) * count, dict.fromkeys(keywords, x), f"{how} and its main_input_name" if named else how)
    yield from _of_text(model, batch)


def _empty(model: nn.Module, *shape: int) -> Tensor:
    floating = (p.dtype for p in model.parameters() if p.is_floating_point())
    return torch.empty(shape, dtype=next(floating, torch.float32), device="meta")


def _required(model: nn.Module) -> tuple[int, list[str]]:
    """Return how many arguments a forward needs by position, at least one in all, and which it needs by keyword."""
    needed = [p for p in inspect.signature(model.forward).parameters.values() if p.default is p.empty]
    keyword = [p.name for p in needed if p.kind is p.KEYWORD_ONLY]
    by_position = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in needed)
    return max(by_position, 0 if keyword else 1), keyword


def _shapes(model: nn.Module, small: bool) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yield shapes without the batch, each with what says so: the configuration, and the first layer of each kind."""
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, Mapping) and config.get("input_size"):
        channels, *native = config["input_size"]
        sizes = [tuple(native), (64, 64), (128, 128)]
        for size in sizes[1:] + sizes[:1] if small else sizes:
            yield (channels, *size), "found by its timm configuration"
    found: dict[str, list[tuple[int, ...]]] = {}
    for module in model.modules():
        for kind, (cls, shapes) in _KINDS.items():
            if isinstance(module, cls) and kind not in found:
                found[kind] = shapes(module)
                side = getattr(getattr(model, "config", None), "image_size", None)
                if isinstance(module, nn.Conv2d) and isinstance(side, int):
                    found[kind].insert(0, (module.in_channels, side, side))
    yield from ((shape, f"found by its first {kind}") for kind, shapes in found.items() for shape in shapes)


def _convolved(conv: Any) -> list[tuple[int, ...]]:
    dimensions = len(conv.kernel_size)
    if dimensions == 1:
        return [(conv.in_channels, 256), (conv.in_channels, 4096), (256, conv.in_channels)]
    if dimensions == 3:
        return [(conv.in_channels, *size) for size in ((8, 64, 64), (16, 112, 112), (16, 224, 224), (64, 64, 64))]
    return [(conv.in_channels, size, size) for size in (64, 128, 224, 32, 28, 299, 256, 384, 512, 96, 16, 8)]


def _normalised(norm: Any) -> list[tuple[int, ...]]:
    return [(norm.num_features, *size) for size in ((256,), (), (64, 64), (8, 64, 64))] + [(256, norm.num_features)]


_KINDS: dict[str, tuple[type[nn.Module], Callable[[Any], list[tuple[int, ...]]]]] = {
    "convolution": (nn.modules.conv._ConvNd, _convolved),
    "linear layer": (nn.Linear, lambda m: [(m.in_features,), (16, m.in_features), (8, 8, m.in_features)]),
    "recurrent layer": (nn.RNNBase, lambda recurrent: [(16, recurrent.input_size)]),
    "norm": (nn.modules.batchnorm._BatchNorm, _normalised),
}
_TRANSFORM = "torchvision.models.detection.transform.GeneralizedRCNNTransform"


def _of_detector(model: nn.Module, count: int) -> Iterator[Guess]:
    """Detectors of torchvision take lists of images, and in train mode what is to be found in them."""
    transform = type(getattr(model, "transform", None))
    if f"{transform.__module__}.{transform.__qualname__}" != _TRANSFORM:
        return
    images = [_empty(model, 3, 128, 128) for _ in range(count)]
    target = {
        "boxes": torch.tensor([[8.0, 8.0, 96.0, 96.0]], dtype=images[0].dtype),
        "labels": torch.ones(1, dtype=torch.int64),
        "masks": torch.ones(1, 128, 128, dtype=torch.uint8),
        "keypoints": torch.full((1, 17, 3), 32.0, dtype=images[0].dtype),
    }
    yield Guess((images, [target] * count), {}, "found by its transform of images")


def _of_text(model: nn.Module, batch: int) -> Iterator[Guess]:
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, Mapping) and dummy:
        yield Guess((), dict(dummy), "found by its dummy_inputs")
    embedding = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if embedding is not None:
        words = torch.empty(batch, 16, dtype=torch.int64, device="meta")
        yield Guess((words,), {}, "found by its first embedding")
