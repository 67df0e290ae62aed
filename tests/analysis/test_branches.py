"""Branches that users write: repeated, doubled, checkpointed, scaled, shared."""

from __future__ import annotations

import torch
from harness import assert_preserved, both, noise, prove, randomise, set_alphas
from readings import actions, alphas, kinds, norms, plan_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import normfree


def body() -> nn.Sequential:
    first = [nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    return nn.Sequential(*first, nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))


class Recurrent(nn.Module):
    """The same branch three times: whatever carries a scalar carries it for all three sums."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 4, 1), body()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = torch.relu(x + self.body(x))
        return x


@both
def test_branch_that_runs_three_times_keeps_its_function_and_has_one_scalar(init: str) -> None:
    model = randomise(Recurrent())
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert norms(converted) == []
    assert kinds(converted) == ["residual"] * 3
    assert alphas(converted) == ["body.3" if init == "skipinit" else "body.4"]
    assert plan_of(converted).declined == ()
    assert_preserved(model, noise(2, 3, 6, 6))


class TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 4, 1), body(), body()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.a(x) + self.b(x)


@both
def test_two_branches_of_one_sum_get_one_alpha_each(init: str) -> None:
    model = randomise(TwoBranches())
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert alphas(converted) == ["a.3", "b.3"]
    assert_preserved(model, noise(2, 3, 6, 6))
    set_alphas(converted, 0.0)
    assert torch.equal(converted(noise(2, 3, 6, 6)), converted.stem(noise(2, 3, 6, 6)))


class BranchAlsoReturned(TwoBranches):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        y = self.a(x)
        return x + y, y


@both
def test_branch_whose_output_is_also_returned_is_declined_with_the_reason(init: str) -> None:
    model = randomise(BranchAlsoReturned())
    del model.b
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert alphas(converted) == []
    (reason,) = plan_of(converted).declined
    assert reason == "add: the branch's output is also used by output"


class Checkpointed(TwoBranches):
    """Gradient checkpointing in training, as timm and torchvision offer it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = checkpoint(self.a, x, use_reentrant=False) if self.training else self.a(x)
        return torch.relu(x + y) + self.b(x)


@both
def test_checkpointed_branch_gets_its_alpha(init: str) -> None:
    model = randomise(Checkpointed())
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert norms(converted) == []
    assert "a.3" in alphas(converted)
    assert_preserved(model, noise(2, 3, 6, 6))


@both
def test_last_norm_initialised_to_zero_still_learns(init: str) -> None:
    model = randomise(TwoBranches())
    for branch in (model.a, model.b):
        nn.init.zeros_(branch[4].weight)
        nn.init.zeros_(branch[4].bias)
        nn.init.zeros_(branch[4].running_mean)
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    converted.train()(noise(2, 3, 6, 6)).sum().backward()
    learner = converted.a[4].gain if init == "preserve" else converted.a[3].raw_alpha
    assert learner.grad.abs().sum() > 0


class Slices(nn.Module):
    """Two names for the same layers, both called: a slice of a Sequential shares its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.full = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1))
        self.first = self.full[:2]

    def forward(self, x: Tensor) -> Tensor:
        return self.full(x) * torch.sigmoid(self.first(x))


@both
def test_layers_reached_through_a_slice_of_a_sequential_are_called_twice(init: str) -> None:
    model = randomise(Slices())
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert actions(converted) == {"full.1": "affine" if init == "preserve" else "delete"}
    assert converted.full[1] is converted.first[1]
    assert_preserved(model, noise(2, 3, 6, 6))


class LayerScale(TwoBranches):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((4, 1, 1), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.gamma * self.a(x)
        return x + self.b(x) * self.gamma.exp()


@both
def test_layer_scale_commutes_with_alpha(init: str) -> None:
    model = randomise(LayerScale())
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert alphas(converted) == ["a.3", "b.3"]
    assert torch.equal(converted.gamma, model.gamma)
    assert_preserved(model, noise(2, 3, 6, 6))


class NormedSkip(TwoBranches):
    """The skip path itself is normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.norm(x) + self.b(self.a(x))


@both
def test_normalised_skip_path_keeps_its_affine_or_becomes_the_identity(init: str) -> None:
    model = randomise(NormedSkip())
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert alphas(converted) == ["b.3"]
    assert_preserved(model, noise(2, 3, 6, 6))
    if init == "skipinit":
        assert torch.equal(converted(noise(2, 3, 6, 6)), torch.relu(converted.stem(noise(2, 3, 6, 6))))


def test_class_methods_and_attributes_survive() -> None:
    model = randomise(LayerScale())
    model.note = {"trained_on": "noise"}
    converted = normfree.convert(model)
    assert type(converted) is LayerScale
    assert converted.note == model.note
    assert [name for name, _ in converted.named_children()] == [name for name, _ in model.named_children()]
