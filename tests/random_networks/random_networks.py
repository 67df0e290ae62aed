"""Descriptions of whole networks, and the builder that makes modules of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from harness import randomise
from random_blocks import Again, Graph, Nest, Res, UNet, Ways, Wrap
from random_functions import JOINS, Call
from random_layers import Act, Conv, Description, Leaf, Norm, Pool
from random_modules import (
    Chain,
    Checkpointed,
    FunctionalNorm,
    Piece,
    Residual,
    Several,
    Split,
    Untraceable,
    Wired,
)
from torch import Tensor, nn


@dataclass(frozen=True, repr=False)
class Network(Description):
    """A whole model.

    Attributes:
        dims: 1, 2 or 3.
        body: Its layers.
        how: What holds them.
        head: ``none``, ``linear``, or ``norm`` for linear, norm, activation, linear.
        outputs: One tensor, a tuple, a dict, or an auxiliary output in training.
        wrap: What the root itself is wrapped into.
        special: What cannot be converted: a norm without statistics, a functional one, or the same unseen by a trace.
        p: Probability of every dropout.
        seed: Of all weights and statistics.
    """

    body: tuple[Any, ...] = ()
    dims: int = 2
    how: str = "sequential"
    head: str = "none"
    outputs: str = "one"
    wrap: str | None = None
    special: str | None = None
    p: float = 0.25
    seed: int = 0

    def inputs(self) -> Tensor:
        """Return a batch of three."""
        size = {1: (6,), 2: (6, 5), 3: (4, 4, 3)}[self.dims]
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(3, 4, *size, generator=generator)

    def build(self) -> nn.Module:
        """Return the model, in train mode but for the norms that are described as evaluating."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.seed)
            return Builder(self.p).network(self)


class Builder:
    """Builds pieces from descriptions while an example runs through them, which tells every shape."""

    def __init__(self, p: float) -> None:
        self.p = p
        self.made: list[nn.Module] = []

    def network(self, network: Network) -> nn.Module:
        x = network.inputs()
        pieces, x = self.pieces(network.body, x)
        if network.special == "stateless":
            pieces += Norm("stateless").build(x, self.p)
        elif network.special is not None:
            bare = FunctionalNorm(x.shape[1])
            pieces.append(Untraceable(bare, "shape") if network.special == "hidden" else bare)
        model = self.container(pieces, network.how)
        if network.wrap is not None:
            model = wrapped(model, network.wrap)
        if network.head != "none" or network.outputs != "one":
            model = Several(model, self.head(network.head, x), network.outputs)
        randomise(model, network.seed)
        model.train()
        for module in model.modules():
            if module.__dict__.pop("keep_evaluating", False):
                module.eval()
        return model

    def head(self, how: str, x: Tensor) -> list[Piece]:
        if how == "none":
            return []
        pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[x.dim() - 3](1)
        c = x.shape[1]
        if how == "linear":
            return [Call("mean"), nn.Linear(c, 3)]
        flats: dict[str, Piece] = {"norm": nn.Flatten(), "norm_flatten": Call("flatten"), "norm_view": Call("view")}
        return [pool, flats[how], nn.Linear(c, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(True), nn.Linear(5, 3)]

    def container(self, pieces: Sequence[Piece], how: str) -> nn.Module:
        modules = [piece for piece in pieces if isinstance(piece, nn.Module)]
        if how == "sequential" and len(modules) == len(pieces):
            return nn.Sequential(*modules)
        return Chain(pieces, untold=how == "untold")

    def pieces(self, layers: Sequence[Any], x: Tensor) -> tuple[list[Piece], Tensor]:
        """Build layers one after the other; return them and the example behind them."""
        found: list[Piece] = []
        for layer in layers:
            made = self.piece(layer, x)
            x = run(made, x)
            found += made
            self.made += [piece for piece in made if isinstance(piece, nn.Module)]
        return found, x

    def piece(self, layer: Any, x: Tensor) -> list[Piece]:
        if isinstance(layer, Leaf):
            return list(layer.build(x, self.p))
        method = getattr(self, type(layer).__name__.lower())
        return list(method(layer, x))

    def again(self, layer: Again, x: Tensor) -> Iterator[Piece]:
        if not self.made:
            return
        module = self.made[-1 - layer.back % len(self.made)]
        try:
            run([module], x)
        except (RuntimeError, ValueError):
            return  # it does not fit here
        yield module

    def nest(self, layer: Nest, x: Tensor) -> Iterator[Piece]:
        yield self.container(self.pieces(layer.layers, x)[0], layer.how)

    def wrap(self, layer: Wrap, x: Tensor) -> Iterator[Piece]:
        found, _ = self.pieces(layer.layers, x)
        # A layer that stands alone is called by the wrapper itself, and by no module that a trace could look into.
        alone = len(found) == 1 and isinstance(found[0], nn.Module)
        yield wrapped(cast(nn.Module, found[0]) if alone else self.container(found, "sequential"), layer.how)

    def res(self, layer: Res, x: Tensor) -> Iterator[Piece]:
        first, y = self.pieces(layer.first, x)
        branch, out = self.pieces(layer.branch, y)
        skip = self.skip(layer.skip, y if layer.preactivated else x, out)
        post, _ = self.pieces(layer.post, out)
        body: list[Piece] = [self.container(branch, "sequential")] if layer.nested else branch
        parts = {"first": first, "branch": body, "skip": skip, "post": post}
        yield Residual(parts, layer.how, layer.skip_first, layer.preactivated)

    def skip(self, how: str, source: Tensor, out: Tensor) -> list[Piece]:
        """Return a skip path from one shape to another: as it is described if that fits, else a projection."""
        options: dict[str, list[Any]] = {
            "identity": [],
            "pool": [Pool("avg")],
            "max": [Pool("max")],
            "conv": [Conv(out.shape[1], stride=2)],
            "norm": [Norm()],
            "conv_norm": [Conv(out.shape[1], stride=2), Norm()],
            "pool_conv_norm": [Pool("avg"), Conv(out.shape[1]), Norm()],
            "blur_conv_norm": [Pool("blur"), Conv(out.shape[1]), Norm()],
        }
        fit = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[out.dim() - 3](out.shape[2:])
        more = out.shape[1] - source.shape[1]
        tries: list[tuple[list[Any], list[Piece]]] = [([], [Call("pad", p=more)])] if how == "pad" and more > 0 else []
        tries += [(options.get(how, []), []), ([Conv(out.shape[1]), Norm()], []), ([Conv(out.shape[1]), Norm()], [fit])]
        for layers, before in tries:
            found, result = self.pieces(layers, run(before, source))
            if result.shape == out.shape:
                break
        return [*before, *found]

    def graph(self, layer: Graph, x: Tensor) -> Iterator[Piece]:
        values = [x]
        wires: list[tuple[list[Piece], int, str | None, int]] = []
        for wire in layer.wires:
            source, other, join = wire.source % len(values), wire.other % len(values), wire.join
            pieces, y = self.pieces(wire.layers, values[source])
            z = values[other]
            same = y.shape[2:] == z.shape[2:] and (y.shape[1] == z.shape[1] or (join == "cat" and z.shape[1] <= 12))
            join = join if same else None
            values.append(y if join is None else JOINS[join](z.clone(), y.clone()))
            wires.append((pieces, source, join, other))
        yield Wired(wires)

    def unet(self, layer: UNet, x: Tensor) -> Iterator[Piece]:
        down, y = self.pieces([Conv(4, 3, 2), Norm(), Act()], x)
        inner, y = self.pieces(layer.layers, y)
        stride = [-(-a // b) for a, b in zip(x.shape[2:], y.shape[2:], strict=True)]
        up: list[Piece] = [nn.Upsample(x.shape[2:])]
        behind: list[Any] = [Conv(x.shape[1]), Norm()]
        if layer.transposed and all(b * s == a for a, b, s in zip(x.shape[2:], y.shape[2:], stride, strict=True)):
            made: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[x.dim() - 3]
            up, behind = [made(y.shape[1], x.shape[1], stride, stride)], [Norm()]
        back, _ = self.pieces(behind, run(up, y))
        yield Wired([([*down, *inner, *up, *back], 0, layer.join, 0)])

    def ways(self, layer: Ways, x: Tensor) -> Iterator[Piece]:
        channels = x.shape[1]
        if layer.how.endswith("slice"):
            found, y = self.pieces(layer.layers, x)
            if y.shape[2:] != x.shape[2:] or y.shape[1] < channels:
                more, y = self.pieces([Pool("identity"), Conv(channels + 2), Norm()], x)
                found = more
            yield Split(found, layer.how, channels, joined=True)
        elif channels > 1:
            at = channels // 2
            part = x[:, : -(-channels // 2) if layer.how == "chunk" else at]
            found, y = self.pieces(layer.layers, part)
            yield Split(found, layer.how, at, joined=y.shape[2:] == x.shape[2:])


def wrapped(inner: nn.Module, how: str) -> nn.Module:
    return Checkpointed(inner) if how == "checkpoint" else Untraceable(inner, how)


def run(pieces: Sequence[Piece], x: Tensor) -> Tensor:
    """Run pieces in eval mode on a copy, so that no statistics and no example move."""
    chain = Chain(pieces, untold=False).eval()
    return chain(x.clone())  # type: ignore[no-any-return]  # a module returns anything


def without_dropout(network: Network) -> Network:
    """Return the same network, weight for weight, with every dropout at zero."""
    return replace(network, p=0.0)
