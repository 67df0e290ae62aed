"""Labelled images one by one, changed at random in a way that depends on seed, epoch and image alone.

So an epoch sees the same pictures in one process and in many, with and without loader workers, and after a resume.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from images import photographs
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset


class SolarCells(Dataset[tuple[Image.Image, int]]):
    """Photographs of solar cells, sound or likely defective, as `torchvision.datasets.ImageFolder` gives its images."""

    classes = ("sound", "defective")

    def __init__(self) -> None:
        self.images, self.defective = photographs()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), int(self.defective[index])


class Varied(Dataset[tuple[Tensor, int]]):
    """Some of the images of a dataset, each through a transform whose draws are the same whenever it is asked for.

    Args:
        images: Gives PIL images and classes by index.
        indices: Which of them.
        transform: Makes a tensor of an image.
        seed: Of its draws.

    Attributes:
        epoch: Set it before each epoch: another epoch has other draws.
    """

    def __init__(self, images: Any, indices: Sequence[int], transform: Callable[..., Tensor], seed: int = 0) -> None:
        self.images, self.indices, self.transform, self.seed = images, indices, transform, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[self.indices[index]]
        with drawing(self.seed, self.epoch, index):
            return self.transform(image), label


@contextlib.contextmanager
def drawing(*key: int) -> Iterator[None]:
    """Seed what transforms draw from (torch, numpy, Python) with numbers, and put all three back afterwards."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
