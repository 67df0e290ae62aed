"""Small networks with batch norm, one of each kind: a stem, nine blocks in three stages, and a classifier."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def conv_norm(c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    """A convolution with a norm behind it."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(c_out))


class Post(nn.Module):
    """Two convolutions, each with a norm, and the skip path."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = conv_norm(c_in, c_out, 3, stride), conv_norm(c_out, c_out)
        self.skip = nn.Identity() if c_in == c_out else conv_norm(c_in, c_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the block makes of `x`."""
        return F.relu(self.skip(x) + self.b(F.relu(self.a(x))))


class Plain(Post):
    """The same without a skip path, as in VGG."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__(c_in, c_out, stride)
        del self.skip

    def forward(self, x: Tensor) -> Tensor:
        """Return what the block makes of `x`."""
        return F.relu(self.b(F.relu(self.a(x))))


class Pre(nn.Module):
    """Norm and activation before each of two convolutions."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.n1, self.c1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.n2, self.c2 = nn.BatchNorm2d(c_out), nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.skip = None if c_in == c_out else nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the block makes of `x`."""
        h = F.relu(self.n1(x))
        return (x if self.skip is None else self.skip(h)) + self.c2(F.relu(self.n2(self.c1(h))))


def small(block: type[nn.Module], width: int = 16, classes: int = 5) -> nn.Sequential:
    """Build a network of nine blocks in three stages."""
    stem = [nn.Conv2d(1, width, 3, 1, 1, bias=False)] if block is Pre else [conv_norm(1, width), nn.ReLU()]
    widths = [width * 2**stage for stage in range(3) for _ in range(3)]
    before = [width, *widths]
    blocks = [block(a, b, 1 if a == b else 2) for a, b in zip(before, widths, strict=False)]
    last = [nn.BatchNorm2d(widths[-1]), nn.ReLU()] if block is Pre else []
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))
    return nn.Sequential(*stem, *blocks, *last, *head)


BLOCKS = {"post-activation": Post, "pre-activation": Pre, "vgg": Plain}
