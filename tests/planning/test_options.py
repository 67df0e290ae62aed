"""``include``, ``exclude``, ``scope`` and ``alpha``."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from harness import Block, assert_close, both, noise, prove, randomise
from readings import actions, alphas, norms, plan_of
from torch import Tensor, nn

import normfree
from normfree.options import Asked, Options


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
        self.blocks = nn.Sequential(Block(), Block(), Block())
        self.head = nn.Sequential(nn.Conv2d(4, 5, 1, bias=False), nn.BatchNorm2d(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


IN_BLOCKS = [f"blocks.{i}.bn{j}" for i in range(3) for j in (1, 2)]
X = (2, 3, 8, 8)


def partial_output(model: nn.Module, converted: nn.Module) -> None:
    """In eval mode a partial ``preserve`` is still the same function, norms that stay included."""
    with torch.no_grad():
        x = noise(*X)
        assert_close(converted.eval()(x), model.eval()(x), 1e-5)


@both
def test_scope_residual_leaves_stem_and_head(init: str) -> None:
    model = randomise(Net())
    converted = prove(model, noise(*X), init=init, scope="residual")
    assert norms(converted) == ["stem.1", "head.1"]
    assert {name for name, action in actions(converted).items() if action == "fold"} == set(IN_BLOCKS)
    assert len(alphas(converted)) == 3
    assert converted.stem[0].bias is None
    assert type(converted.stem[0]) is nn.Conv2d
    assert torch.equal(converted.stem[0].weight, model.stem[0].weight)
    if init == "preserve":
        partial_output(model, converted)


@both
def test_include_converts_only_what_it_names(init: str) -> None:
    model = randomise(Net())
    converted = prove(model, noise(*X), init=init, include="blocks.1.*")
    assert norms(converted) == [n for n in ["stem.1", *IN_BLOCKS, "head.1"] if not n.startswith("blocks.1.")]
    assert alphas(converted) == ["blocks.1.conv2"]
    if init == "preserve":
        partial_output(model, converted)


@both
def test_several_patterns_are_alternatives(init: str) -> None:
    converted = prove(randomise(Net()), noise(*X), init=init, include=["stem.*", "head.1"])
    assert norms(converted) == IN_BLOCKS
    assert alphas(converted) == []


@both
def test_exclude_keeps_a_norm_and_wins_over_include(init: str) -> None:
    model = randomise(Net())
    converted = prove(model, noise(*X), init=init, include="blocks.*", exclude="blocks.0.bn1")
    assert norms(converted) == ["stem.1", "blocks.0.bn1", "head.1"]
    reasons = {edit.name: edit.reason for edit in plan_of(converted).norms if edit.action == "keep"}
    assert reasons == {"stem.1": "not in include", "blocks.0.bn1": "in exclude", "head.1": "not in include"}
    assert len(alphas(converted)) == 3
    kept, old = converted.blocks[0].bn1, model.blocks[0].bn1
    assert all(torch.equal(value, old.state_dict()[key]) for key, value in kept.state_dict().items())


@both
def test_branch_whose_last_norm_stays_takes_alpha_behind_it(init: str) -> None:
    model = randomise(Net())
    converted = prove(model, noise(*X), init=init, exclude="blocks.0.bn2")
    assert alphas(converted) == ["blocks.0.bn2", "blocks.1.conv2", "blocks.2.conv2"]
    assert isinstance(converted.blocks[0].bn2, nn.BatchNorm2d)
    if init == "preserve":
        partial_output(model, converted)


@both
def test_excluded_sum_gets_no_scalar_and_loses_its_norms(init: str) -> None:
    model = randomise(Net())
    converted = prove(model, noise(*X), init=init, exclude="blocks.2.add")
    assert norms(converted) == []
    assert alphas(converted) == ["blocks.0.conv2", "blocks.1.conv2"]
    assert "excluded by name" in plan_of(converted).sums[2].reason


@both
@pytest.mark.parametrize(("alpha", "value"), [(0.3, 0.3), (0, 0.0), (-2, -2.0), ("rsqrt_depth", 3**-0.5)])
def test_alpha_starts_where_it_is_told(alpha: float | str, value: float, init: str) -> None:
    converted = prove(randomise(Net()), noise(*X), init=init, alpha=alpha)
    carriers = [module for module in converted.modules() if module._parameters.get("raw_alpha") is not None]
    assert [carrier.raw_alpha.shape for carrier in carriers] == [(1,)] * 3
    found = [carrier.alpha for carrier in carriers]
    assert found == pytest.approx([value] * 3, abs=1e-6)


@pytest.mark.parametrize(("init", "value"), [("skipinit", 0.0), ("preserve", 1.0)])
def test_alpha_starts_at_zero_from_scratch_and_at_one_to_preserve(init: str, value: float) -> None:
    converted = normfree.convert(randomise(Net()), init=init)
    assert [getattr(m, "alpha", None) for m in converted.modules() if "raw_alpha" in m._parameters].count(value) == 3


def test_alpha_other_than_one_scales_the_preserved_branch() -> None:
    model = randomise(Net())
    converted = normfree.convert(model, init="preserve", alpha=0.3).eval()
    block, old = converted.blocks[0], model.blocks[0].eval()
    x = noise(2, 4, 6, 6)
    branch = old.bn2(old.conv2(torch.relu(old.bn1(old.conv1(x)))))
    assert_close(block(x), torch.relu(x + 0.3 * branch), 1e-5)


def test_plan_changes_nothing_and_is_what_convert_applies() -> None:
    model = randomise(Net())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    types = [type(module) for module in model.modules()]
    made = normfree.plan(model, init="skipinit", scope="residual", alpha=0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [type(module) for module in model.modules()] == types
    assert plan_of(normfree.convert(model, init="skipinit", scope="residual", alpha=0.5)) == made
    assert normfree.Plan.from_json(made.to_json()) == made


def test_skipinit_draws_he_weights_and_preserve_keeps_the_old_ones() -> None:
    model = randomise(Net())
    drawn = normfree.convert(model, init="skipinit")
    gains = dict(plan_of(drawn).weights)
    assert gains["blocks.0.conv1"] == pytest.approx(2**0.5, abs=1e-4)
    assert gains["head.0"] == 1.0
    for block in (0, 1, 2):
        old, new = model.blocks[block].conv1.weight, drawn.blocks[block].conv1.weight
        assert not torch.equal(old, new)
        assert new.std().item() == pytest.approx((2 / 36) ** 0.5, rel=0.25)
    kept = normfree.convert(model, init="preserve")
    assert torch.equal(kept.blocks[0].conv1.weight, model.blocks[0].conv1.weight)


def test_options_are_the_same_to_a_type_checker() -> None:
    assert list(Asked.__annotations__) == [field.name for field in dataclasses.fields(Options)]
    shown = inspect.signature(normfree.convert).parameters
    assert [name for name in shown if name not in ("model", "plan", "check")] == list(Asked.__annotations__)
