"""Going on with a converted model: its plan is applied to a fresh one, which then takes its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import both, noise, randomise, set_alphas
from readings import plan_of
from tied import Net
from torch import nn

import normfree
from normfree.errors import CheckpointError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore::normfree.checkpoint.saving.SaveWarning")

X = noise(2, 3, 8, 8)


@pytest.fixture
def trained() -> nn.Module:
    return set_alphas(normfree.convert(randomise(Net()), init="preserve"), 0.5).eval()


@pytest.mark.parametrize("form", ["object", "json", "text file", "file", "folder"])
def test_a_fresh_model_takes_plan_and_checkpoint(trained: nn.Module, tmp_path: Path, form: str) -> None:
    plan: object = normfree.Plan.of(trained)
    if form == "json":
        plan = normfree.Plan.of(trained).to_json()
    elif form == "text file":
        plan = tmp_path / "plan.json"
        plan.write_text(normfree.Plan.of(trained).to_json())
    elif form != "object":
        plan = str(tmp_path / ("nf.safetensors" if form == "file" else "nf"))
        normfree.save(trained, plan)
    for again in (normfree.convert(Net(), plan=plan), normfree.convert_(Net(), plan=plan)):
        again.load_state_dict(trained.state_dict())
        assert torch.equal(again.eval()(X), trained(X))
        assert plan_of(again) == plan_of(trained)


def test_a_plan_of_the_same_model_makes_the_same_conversion() -> None:
    model = randomise(Net())
    made = normfree.plan(model, init="preserve")
    first, second = normfree.convert(model, init="preserve"), normfree.convert(model, plan=made)
    assert all(torch.equal(a, second.state_dict()[key]) for key, a in first.state_dict().items())


@both
def test_the_wrong_plan_is_told_by_load_state_dict(trained: nn.Module, init: str) -> None:
    here = normfree.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), init=init)
    there = normfree.convert(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), init="preserve" if init == "skipinit" else "skipinit"
    )
    with pytest.raises(RuntimeError, match=r"by another plan.*normfree\.convert\(model, plan=") as caught:
        here.load_state_dict(there.state_dict())
    assert str(caught.value).count("another plan") == 1
    with pytest.raises(RuntimeError, match="by another plan"):
        nn.Sequential(normfree.convert(Net())).load_state_dict(nn.Sequential(trained).state_dict())


def test_what_went_back_says_nothing_of_plans(trained: nn.Module) -> None:
    restored = normfree.restore(trained)
    with pytest.raises(RuntimeError) as caught:
        restored.load_state_dict(trained.state_dict())
    assert "plan" not in str(caught.value)


def test_plans_that_make_no_sense(trained: nn.Module, tmp_path: Path) -> None:
    plan = normfree.Plan.of(trained)
    with pytest.raises(UsageError, match="a plan says all that init, alpha would say"):
        normfree.convert(Net(), plan=plan, init="preserve", alpha=1.0)
    with pytest.raises(UsageError, match="the plan is not one of this Sequential: the plan .*'bn'"):
        normfree.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), plan=plan)
    with pytest.raises(UsageError, match=r"of a fused model.*normfree\.load"):
        normfree.convert(Net(), plan=normfree.Plan.of(normfree.fuse(trained)))
    with pytest.raises(UsageError, match="plan is a dict; it must be a Plan, its JSON, or a path"):
        normfree.convert(Net(), plan={"plan": plan})  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"missing\.json: no plan can be read"):
        normfree.convert(Net(), plan=tmp_path / "missing.json")
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"bad\.json: the stored plan cannot be read"):
        normfree.convert(Net(), plan=tmp_path / "bad.json")
    with pytest.raises(UsageError, match="carries no plan"):
        normfree.Plan.of(Net())
