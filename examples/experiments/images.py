"""The images of the training experiments, in three parts that are always the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Images `(N, C, H, W)` and their classes `(N,)`."""

    x: Tensor
    y: Tensor

    def to(self, device: str) -> Part:
        """Return the part on a device."""
        return Part(self.x.to(device), self.y.to(device))


@dataclass(frozen=True)
class Data:
    """Labelled images in three parts; training may mirror them, or shift them by up to `shift` pixels."""

    train: Part
    validation: Part
    test: Part
    classes: int
    mirror: bool = False
    shift: int = 0

    def to(self, device: str) -> Data:
        """Return the data on a device."""
        parts = {name: getattr(self, name).to(device) for name in ("train", "validation", "test")}
        return replace(self, **parts)


def parts(images: int, shares: tuple[float, float] = (0.6, 0.2)) -> tuple[Tensor, Tensor, Tensor]:
    """Say which images train, which validate and which test: always the same.

    Args:
        images: How many there are.
        shares: Of the images for training and for validation; the rest is for the test.
    """
    order = torch.from_numpy(np.random.RandomState(0).permutation(images))  # the same with every version of numpy
    first, second = round(shares[0] * images), round((shares[0] + shares[1]) * images)
    return order[:first], order[first:second], order[second:]


def split(x: Tensor, y: Tensor, mirror: bool = False, scale: tuple[float, float] | None = None) -> Data:
    """Split images in three parts, always in the same way, and scale them.

    Args:
        x: Images `(N, C, H, W)`.
        y: Classes `(N,)`.
        mirror: Whether training may mirror them.
        scale: What is subtracted from a pixel and what it is then divided by, where a pretrained network wants that;
            without, the training images get zero mean and unit variance.
    """
    three = parts(len(y))
    mean, std = scale or (x[three[0]].mean(), x[three[0]].std())
    train, validation, test = (Part((x[i] - mean) / std, y[i]) for i in three)
    return Data(train, validation, test, int(y.max()) + 1, mirror)


def digits() -> Data:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels in grey: 1,078 / 359 / 360; shifted by a pixel at most."""
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    data = split(torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(classes))
    return replace(data, shift=1)


def folder(path: Path, size: int) -> Data:
    """Read a folder with one folder of images a class, in colour, scaled to `size` x `size`."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    steps = [v2.ToImage(), v2.Resize((size, size), antialias=True), v2.ToDtype(torch.float32, scale=True)]
    try:
        images = list(ImageFolder(str(path), v2.Compose(steps)))
    except FileNotFoundError as error:
        raise SystemExit(f"--images {path}: {str(error).splitlines()[0]}") from None
    return split(torch.stack([x for x, _ in images]), torch.tensor([y for _, y in images]))


def photographs() -> tuple[Any, Any]:
    """2,624 solar cells in grey `(N, 300, 300)`, and which are likely defective (31 %) (elpv-dataset on PyPI)."""
    from elpv_dataset.utils import load_dataset

    images, probability, _ = load_dataset()
    return images, probability > 0.5


def solar_cells(size: int, scale: tuple[float, float] | None = None) -> Data:
    """Photographs of solar cells in colour, scaled to `size` x `size`, sound or likely defective: 1,574 / 525 / 525."""
    from torchvision.transforms.v2 import functional as tv

    images, defective = photographs()
    cells = torch.cat(
        [tv.resize(part, [size, size], antialias=True) for part in torch.tensor(images)[:, None].split(64)]
    )
    return split(cells.float().expand(-1, 3, -1, -1), torch.tensor(defective).long(), mirror=True, scale=scale)


def textures(size: int, scale: tuple[float, float] | None = None) -> Data:
    """Pieces of scikit-image's brick, grass and gravel, 32 of 512 pixels a side, enlarged: 461 / 153 / 154."""
    from skimage import data
    from torchvision.transforms.v2 import functional as tv

    photographed = torch.stack([torch.from_numpy(getattr(data, name)()) for name in ("brick", "grass", "gravel")])
    pieces = photographed.unfold(1, 32, 32).unfold(2, 32, 32).reshape(-1, 1, 32, 32)
    kinds = torch.arange(3).repeat_interleave(len(pieces) // 3)
    return split(tv.resize(pieces, [size, size]).float().expand(-1, 3, -1, -1), kinds, mirror=True, scale=scale)
