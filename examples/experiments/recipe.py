"""The training loop behind every table here, and the recipe it uses by default.

A network without normalisation trains with the same optimizer and schedule as one with it. What it needs beside them is
found by `find_recipe.py`, on small networks; `RECIPE` is the outcome.

    model = normfree.convert(model)
    outcome = train(model, data, RECIPE, lr=0.5, epochs=16, batch=64, seed=0)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from images import Data, Part
from steps import gradients, recorded
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

import normfree


@dataclass(frozen=True)
class Recipe:
    """How to train: all but the learning rate, which every table chooses on held-out images.

    Attributes:
        warmup: Share of the steps in which the learning rate grows from zero; a cosine takes it back to zero.
        clip: `"none"`, `"norm:1"` (the norm of the whole gradient) or `"agc:0.1"` (adaptive, unit by unit).
        scalar_rate: Learning rate of the alphas over that of the weights.
        scalar_lr: Learning rate of the alphas, whatever that of the weights is; instead of `scalar_rate`.
        weight_decay: Of weights; vectors and scalars get none.
        momentum: Of SGD, in Nesterov's form.
    """

    warmup: float = 0.0
    clip: str = "none"
    scalar_rate: float = 1.0
    scalar_lr: float | None = None
    weight_decay: float = 5e-4
    momentum: float = 0.9

    def clipper(self, norm: Callable[..., object] = nn.utils.clip_grad_norm_) -> Callable[[nn.Module], object]:
        """Return what clips the gradients of a model; `norm` clips by the norm of all of them, as torch's does."""
        kind, _, value = self.clip.partition(":")
        if kind == "norm":
            return lambda model: norm(model.parameters(), float(value))
        if kind == "agc":
            return lambda model: normfree.clip_grad(model, clip_factor=float(value))
        if kind == "none":
            return lambda _: None
        raise ValueError(f"clip is none, norm:NUMBER or agc:NUMBER, not {self.clip}")

    def groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """Return the parameter groups of a model."""
        scalar_lr = lr * self.scalar_rate if self.scalar_lr is None else self.scalar_lr
        return normfree.param_groups(model, lr=lr, weight_decay=self.weight_decay, scalar_lr=scalar_lr)


RECIPE = Recipe(warmup=0.1, clip="norm:0.3", scalar_lr=0.3)
BN_RECIPE = Recipe(warmup=0.1)
FINE_TUNING = Recipe(warmup=0.1, clip="norm:1")
"""From alpha = 1, at pretrained weights: batch norm's own recipe, and a clip that only a step gone wrong meets."""


@dataclass(frozen=True)
class Outcome:
    """What came of one run.

    Attributes:
        validation: Accuracy on the images that choose the learning rate; nothing if it diverged.
        test: Accuracy on the images that choose nothing.
        seconds: How long it took.
        curve: The mean training loss of each epoch.
        status: `"trained"`, or `"diverged"` if a loss or a logit was not finite.
    """

    validation: float | None
    test: float | None
    seconds: float
    curve: str
    status: str


def train(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    *,
    lr: float,
    epochs: int,
    batch: int,
    seed: int,
    device: str = "cpu",
    bf16: bool = False,
) -> Outcome:
    """Train `model` in place and return what came of it; the same seed gives the same outcome on the same machine."""
    start, data = time.perf_counter(), data.to(device)
    curve = fit(model, data, recipe, lr=lr, epochs=epochs, batch=batch, seed=seed, device=device, bf16=bf16)
    return outcome(model, data, curve, start)


def outcome(model: nn.Module, data: Data, curve: list[float], start: float) -> Outcome:
    """Look at a trained model, whose training began at `start`; one whose loss was not finite is not looked at."""
    finite = math.isfinite(curve[-1])
    validation, test = (accuracy(model, part) if finite else None for part in (data.validation, data.test))
    status = "diverged" if validation is None or test is None else "trained"
    return Outcome(validation, test, since(start), written(curve), status)


def fit(
    model: nn.Module,
    data: Data,
    recipe: Recipe,
    *,
    lr: float,
    epochs: int,
    batch: int,
    seed: int,
    device: str = "cpu",
    bf16: bool = False,
    frozen: Iterable[nn.Module] = (),
) -> list[float]:
    """Train `model` in place, `frozen` parts of it in eval mode; return each epoch's loss, ended by the first nan.

    With `bf16` forward passes run under autocast, and images and weights have their channels last, as a GPU likes it.
    """
    torch.manual_seed(seed)
    clip = recipe.clipper()
    layout = torch.channels_last if bf16 else torch.contiguous_format
    model.to(device=device, memory_format=layout).train()
    for module in frozen:
        module.eval()
    optimizer = torch.optim.SGD(recipe.groups(model, lr), lr=lr, momentum=recipe.momentum, nesterov=True)
    each = len(data.train.y) // batch  # an incomplete batch is dropped
    schedule = cosine(optimizer, recipe.warmup, epochs * each)
    step: Callable[[Tensor, Tensor], Tensor] = partial(gradients, model, bf16=bf16)
    if data.train.x.is_cuda:
        sample = data.train.x[:batch].contiguous(memory_format=layout)
        step = recorded(model, sample, data.train.y[:batch], bf16)
    curve: list[float] = []
    for epoch in range(epochs):
        total = torch.zeros((), device=device)
        for i, (x, y) in enumerate(batches(data, batch)):
            schedule.step_update(epoch * each + i + 1)
            total += step(x.contiguous(memory_format=layout), y)
            clip(model)
            optimizer.step()
        if not math.isfinite(total):  # asked once an epoch: on a GPU the answer waits for all work in flight
            return [*curve, math.nan]
        curve.append(total.item() / each)
    return curve


def cosine(optimizer: torch.optim.Optimizer, warmup: float, steps: int) -> CosineLRScheduler:
    """Linear from zero in the first steps, then a cosine to zero: no step of 1 .. `steps` has a rate of zero."""
    first = round(warmup * steps)
    return CosineLRScheduler(
        optimizer, t_initial=steps + 1 - first, warmup_t=first, warmup_prefix=True, t_in_epochs=False
    )


def batches(data: Data, size: int) -> list[tuple[Tensor, Tensor]]:
    """One epoch in random order; mirrored and shifted at random where the data allow it."""
    order = torch.randperm(len(data.train.y)).to(data.train.y.device)
    whole = order[: len(order) // size * size].split(size)
    return [(varied(data.train.x[i], data), data.train.y[i]) for i in whole]


def varied(x: Tensor, data: Data) -> Tensor:
    """Change each image in the ways that the data allow."""
    x = mirrored(x) if data.mirror else x
    return shifted(x, data.shift) if data.shift else x


def mirrored(x: Tensor) -> Tensor:
    """Flip each image with even odds, along its width and along its height."""
    for dim in (2, 3):
        flip = torch.rand(len(x), 1, 1, 1).to(x.device) < 0.5
        x = torch.where(flip, x.flip(dim), x)
    return x


def shifted(x: Tensor, most: int) -> Tensor:
    """Move each image by up to so many pixels in each direction, with the background (the least value) behind it."""
    padded = F.pad(x, (most,) * 4, value=x.min().item())
    rows, columns = (
        (torch.randint(2 * most + 1, (len(x), 1)) + torch.arange(size)).to(x.device) for size in x.shape[2:]
    )
    each = torch.arange(len(x), device=x.device)[:, None, None]
    return padded[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(model: nn.Module, part: Part) -> float | None:
    """Return the share of images named rightly in eval mode, or nothing if a logit is not finite."""
    logits = torch.cat([model.eval()(x) for x in part.x.split(256)])
    return round((logits.argmax(1) == part.y).float().mean().item(), 5) if logits.isfinite().all() else None


def since(start: float) -> float:
    """Return the seconds since a moment."""
    return round(time.perf_counter() - start, 1)


def written(curve: list[float]) -> str:
    """Put a curve into one cell of a table."""
    return " ".join(f"{loss:.4g}" for loss in curve)
