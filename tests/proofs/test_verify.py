"""Models that are hard to prove anything about: in float64, or one sample at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from harness import Stem, assert_close, both, noise, prove, randomise
from readings import alphas
from torch import Tensor, nn

import normfree
from normfree.tracing.copying import deep_copy, in_float64

X = noise(4, 3, 6, 6)


class Tables(Stem):
    """Tensors that are neither parameters nor buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.tables = torch.eye(4), {"rows": [torch.ones(6)], "count": torch.tensor(2)}

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x) @ self.tables["rows"][0]
        return y.mean(2) @ self.table[: self.tables["count"]].T


@both
def test_plain_tensors_go_to_float64_with_the_rest(init: str) -> None:
    model = randomise(Tables())
    converted = prove(model, X, init=init)
    report = normfree.verify(converted, model, X)
    assert not any("float32:" in proof.detail for proof in report.proofs)
    assert (model.table.dtype, converted.table.dtype) == (torch.float32, torch.float32)


def test_another_original_is_named_as_a_reason() -> None:
    one, another = (randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), seed) for seed in (0, 1))
    said = normfree.verify(normfree.convert(one, init="preserve"), another, X).proofs[2]
    assert said.passed is False
    assert said.detail.endswith("made anew it is exact: trained since, or of another model?")


class Mailbox(Stem):
    """Two modules that share a list, through which one passes something on to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = Reader()
        self.box = self.reader.box = [torch.ones(1)]

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        self.box[0] = y.mean((1, 2, 3), keepdim=True)
        return self.reader(y)


class Reader(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - self.box[0]


def test_list_that_two_modules_share_stays_shared_in_float64() -> None:
    model = randomise(Mailbox()).eval()
    double = in_float64(deep_copy(model))
    assert double.box is double.reader.box
    assert_close(double(X.double()).float(), model(X), 1e-6)


class Grid(Stem):
    """Makes float32 tensors in its forward, whatever its own type is."""

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x) @ torch.linspace(-1, 1, 36).reshape(6, 6)


@both
def test_model_that_cannot_run_in_float64_is_proved_in_its_own_type(init: str) -> None:
    model = randomise(Grid())
    report = normfree.verify(prove(model, X, init=init), model, X)
    assert all("in float32: in float64 it raises RuntimeError" in proof.detail for proof in report.proofs)
    assert report.proofs[2].passed is (True if init == "preserve" else None)


def test_error_beyond_rounding_is_found_without_float64() -> None:
    model = randomise(Grid())
    converted = normfree.convert(model, init="preserve", inputs=X)
    assert normfree.verify(converted, model, X).proofs[2].passed
    with torch.no_grad():
        converted.conv.gain *= 1 + 1e-4
    assert normfree.verify(converted, model, X).proofs[2].passed is False


def test_model_that_cannot_run_at_all_raises_its_own_error() -> None:
    converted = normfree.convert(randomise(Grid()), init="preserve", inputs=X)
    with pytest.raises(RuntimeError, match="size mismatch|mat1 and mat2|shapes"):
        normfree.verify(converted, None, noise(2, 3, 5, 5))


class Clips(Stem):
    """Two frames a clip, one row a clip."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return y.reshape(len(x) // 2, 2, 4, 6, 6).mean(1)


class Frames(Stem):
    """Two frames a clip, one row a frame, and the frames of a clip see each other."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).reshape(len(x) // 2, 2, 4, 6, 6)
        return (y + y.flip(1)).flatten(0, 1)


class Pairs(Stem):
    """Wants at least two samples, for no reason."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < 2:
            raise ValueError("at least two samples")
        return self.mix(self.stem(x))

    def mix(self, x: Tensor) -> Tensor:
        return x


class Centred(Pairs):
    """Looks at the whole batch in train mode, as a loss may: the norm had nothing to do with it."""

    def mix(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True) if self.training else x


class Mixing(Pairs):
    """Looks at the whole batch in both modes: nobody can say what the norm had to do with it."""

    def mix(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


COMPANY: dict[str, tuple[Callable[[], nn.Module], bool | None, str]] = {
    "clips": (Clips, True, "2 at a time"),
    "frames": (Frames, True, "2 at a time"),
    "pairs": (Pairs, True, "with the others replaced the largest relative difference is 0.0e+00"),
    "centred": (Centred, None, "what the original returns with its norms frozen tells no samples apart"),
    "mixing": (Mixing, None, "what the original returns with its norms frozen tells no samples apart"),
}


@both
@pytest.mark.parametrize("how", COMPANY)
def test_samples_that_never_run_alone_are_replaced_instead(how: str, init: str) -> None:
    make, passed, said = COMPANY[how]
    model = randomise(make())
    proof = normfree.verify(normfree.convert(model, init=init, inputs=X), model, X).proofs[1]
    assert proof.passed is passed, proof
    assert proof.detail.startswith("no sample runs alone (")
    assert said in proof.detail


class Summed(Stem):
    """Returns a mean over the batch beside its rows, as a model with a loss of its own does."""

    def __init__(self, rows: bool) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.stem(x)
        return (y, y.mean()) if self.rows else (y.mean(),)


@both
@pytest.mark.parametrize("rows", [True, False])
def test_mean_over_the_batch_that_the_original_returns_is_left_aside(rows: bool, init: str) -> None:
    model = randomise(Summed(rows))
    proof = normfree.verify(normfree.convert(model, init=init), model, X).proofs[1]
    assert proof.passed is (True if rows else None)
    assert proof.detail.endswith(f"mixes the samples too in 1 of {1 + rows} outputs")


class WithLoss(Stem):
    """Returns a loss in train mode, as an autoencoder beside a segmentation does."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.stem(x)
        return (y, y.square().mean()) if self.training else (y,)


@both
def test_mean_over_the_batch_in_train_mode_alone_is_left_aside(init: str) -> None:
    model = randomise(WithLoss())
    proof = normfree.verify(normfree.convert(model, init=init), model, X).proofs[1]
    assert (proof.passed, proof.detail.endswith("in 1 of 2 outputs")) == (True, True), proof


class Centre(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


@pytest.mark.parametrize("tracked", [True, False])
def test_norm_without_statistics_excuses_no_mixing(tracked: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=tracked), nn.ReLU())
    converted = normfree.convert(model, init="skipinit")
    assert normfree.verify(converted, model, X).ok
    converted[2] = Centre()
    assert normfree.verify(converted, model, X).proofs[1].passed is False


@both
def test_proofs_need_gradients_and_take_them_whoever_asks(init: str) -> None:
    original = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    converted, x = normfree.convert(original, init=init), noise(2, 3, 6, 6)
    with torch.no_grad():
        assert normfree.verify(converted, original, x).ok
    with torch.inference_mode():
        assert normfree.verify(converted, original, x).ok


def test_a_branch_that_ends_in_place_is_looked_at_as_it_is_returned() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.act(self.norm(self.conv(x)))
            return y.add_(x)

    original = nn.Sequential(nn.Conv2d(3, 4, 1), Block())
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    converted = normfree.convert(original, init="preserve", inputs=x)
    assert alphas(converted) == ["1.skipinit_0"], "what the activation returns is what it was given"
    assert normfree.verify(converted, original, x).proofs[3].passed
