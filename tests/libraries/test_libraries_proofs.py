"""The proof of models that take or return what other libraries do: nested inputs, objects, time first, caches.

A proof must neither fail over something the model may do, nor pass because it found nothing to compare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Block, both, noise, prove, randomise
from readings import alphas
from torch import Tensor, nn

import normfree
from normfree.errors import UsageError


class Nested(nn.Module):
    """Takes a batch as a data loader makes it."""

    def __init__(self, pick: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.stem, self.block, self.pick = nn.Conv2d(3, 4, 1), Block(), pick

    def forward(self, batch: Any) -> Any:
        return self.block(self.stem(self.pick(batch)))


X = noise(2, 3, 6, 6)
NESTED: dict[str, tuple[Callable[[Any], Tensor], Any]] = {
    "dict": (lambda batch: batch["image"], {"image": X, "id": torch.arange(2)}),
    "list": (lambda batch: batch[0] + batch[1], [X, X]),
    "dict of lists": (lambda batch: batch["images"][1], {"images": [X, X]}),
}


@both
@pytest.mark.parametrize("how", NESTED)
def test_inputs_in_a_dict_or_a_list_are_proved(how: str, init: str) -> None:
    pick, batch = NESTED[how]
    converted = prove(randomise(Nested(pick)), (batch,), init=init)
    assert alphas(converted) == ["block.conv2"]


@dataclass
class Output:
    """What many models return."""

    logits: Tensor
    hidden: tuple[Tensor, ...] = ()


class Structured(nn.Module):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.stem, self.block, self.wrap = nn.Conv2d(3, 4, 1), Block(), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.block(self.stem(x)))


WRAPS: dict[str, Callable[[Tensor], Any]] = {
    "dataclass": lambda x: Output(x, (x + 1,)),
    "dataclass in a list": lambda x: [Output(x)],
    "namespace": lambda x: SimpleNamespace(logits=x),
}


@pytest.mark.parametrize("how", WRAPS)
def test_outputs_in_an_object_are_compared_or_refused(how: str) -> None:
    model = randomise(Structured(WRAPS[how]))
    converted = normfree.convert(model, init="preserve")
    try:
        report = normfree.verify(converted, model, X)
    except UsageError as error:
        assert "output" in str(error)  # noqa: PT017  # to say that nothing was found is right, too
        return
    assert report.ok, report
    with torch.no_grad():
        converted.get_parameter("stem.weight").mul_(2)
    assert normfree.verify(converted, model, X).proofs[2].passed is False


class Decoder(nn.Module):
    """Takes the levels of an encoder as a list; the scalar lives in the block below."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)), nn.ReLU()

    def forward(self, levels: list[Tensor]) -> Any:
        return self.out(levels[-1] + self.out(self.body(levels[-1])) * levels[0].mean((1, 2, 3), keepdim=True))


class Splat(Decoder):
    def forward(self, *levels: Tensor) -> Any:  # type: ignore[override]
        return self.out(levels[-1] + self.body(self.out(levels[-1])))


class Named(Decoder):
    def forward(self, x: Tensor, **options: Any) -> Any:  # type: ignore[override]
        return self.out(x + self.body(self.out(x)) * options["factor"])


class Network(nn.Module):
    """Checks its input, so that the decoder is traced by itself."""

    def __init__(self, decoder: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.decoder, self.call = nn.Conv2d(3, 4, 1), decoder, call

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % 2:
            raise ValueError("the size must be even")
        return self.call(self.decoder, self.stem(x))


CALLS: dict[str, tuple[type[nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "list": (Decoder, lambda decoder, x: decoder([x, x * 2])),
    "list by keyword": (Decoder, lambda decoder, x: decoder(levels=[x, x * 2])),
    "splat": (Splat, lambda decoder, x: decoder(x, x * 2)),
    "keywords": (Named, lambda decoder, x: decoder(x, factor=2.0)),
}


@both
@pytest.mark.parametrize("how", CALLS)
def test_part_that_takes_more_than_tensors_is_proved(how: str, init: Any) -> None:
    cls, call = CALLS[how]
    model = randomise(Network(cls(), call))
    report = normfree.verify(normfree.convert(model, init=init), model, X)
    assert report.ok, report


class Iterating(nn.Module):
    """Runs the blocks of a container one by one: the container itself is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 4, 1), nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = [self.stem(x)]
        for block in self.blocks:
            if outputs[-1].shape[2] > 1:
                outputs.append(block(outputs[-1]))
        return outputs


@both
def test_blocks_of_a_container_that_is_never_called_are_proved(init: str) -> None:
    converted = prove(randomise(Iterating()), X, init=init)
    assert alphas(converted) == ["blocks.0.conv2", "blocks.1.conv2"]


class Caching(nn.Module):
    """Keeps what it computed in eval mode, as attention layers keep their biases."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(4, 1, 1))
        self.cache: dict[str, Tensor] = {}
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def bias(self) -> Tensor:
        if self.training:
            return self.table.exp()
        if "bias" not in self.cache:
            self.cache["bias"] = self.table.exp()
        return self.cache["bias"]

    def forward(self, x: Tensor) -> Any:
        return x + self.bn(self.conv(F.relu(x + self.bias())))


@both
def test_cache_that_a_trace_fills_is_not_used_by_the_next(init: str) -> None:
    model = randomise(Network(Caching(), lambda decoder, x: decoder(x)))
    converted = prove(model, X, init=init)
    assert converted.decoder.cache == {}
    assert alphas(converted) == ["decoder.conv"]


@both
@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
def test_buffers_that_move_from_call_to_call_are_no_dependence_on_the_batch(init: str) -> None:
    model = nn.Sequential(torch.nn.utils.spectral_norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4), nn.ReLU(), Block())
    prove(randomise(model), X, init=init)


class TimeFirst(nn.Module):
    """Returns ``(T, N, C)``, as recurrent networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norms = nn.Conv2d(3, 4, 1), nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([norm(self.conv(x)).mean((2, 3)) for norm in self.norms])


@both
def test_batch_may_be_another_dimension_of_the_output(init: str) -> None:
    prove(randomise(TimeFirst()), X, init=init)


class Rounding(nn.Module):
    """An activation whose two ways of working round differently."""

    def __init__(self) -> None:
        super().__init__()
        self.inplace = True

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(torch.sigmoid(x)) if self.inplace else F.silu(x)


@both
@pytest.mark.parametrize("original", [True, False])
def test_rounding_of_an_activation_that_works_in_place_is_no_overwriting(original: bool, init: Any) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Rounding(), nn.Conv2d(4, 4, 3)))
    report = normfree.verify(normfree.convert(model, init=init), model if original else None, X)
    assert report.ok, report
