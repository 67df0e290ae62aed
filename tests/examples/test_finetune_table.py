"""The arms of the fine-tuning table are what they say, and its columns measure what they say."""

from __future__ import annotations

from argparse import Namespace

import finetune_table
import lite
import pytest
import torch
from harness import noise
from images import Data, Part
from torch import nn

import normfree
from normfree.layers import HasAlpha
from normfree.norms import find_norms

OPTIONS = Namespace(model="test_resnet", epochs=1, device="cpu", images=None, size=32, bf16=False, workers=1)


def data(images: int) -> Data:
    part = Part(noise(images, 3, 32, 32), torch.arange(images) % 2)
    return Data(part, part, part, 2)


@pytest.fixture(scope="module")
def arms() -> dict[str, tuple[nn.Module, list[nn.Module]]]:
    made = {}
    for name in finetune_table.ARMS:
        torch.manual_seed(0)
        made[name] = finetune_table.network(name, OPTIONS, 2)
    return made


def test_arms_are_what_they_say(arms: dict[str, tuple[nn.Module, list[nn.Module]]]) -> None:
    norms = {name: len(find_norms(model)) for name, (model, _) in arms.items()}
    assert norms == {"bn": 15, "frozen": 15, "groupnorm": 0, "preserve": 0, "folded": 0, "alpha0": 0}
    assert {name: len(frozen) for name, (_, frozen) in arms.items()} == {**dict.fromkeys(norms, 0), "frozen": 15}
    groups = [m for m in arms["groupnorm"][0].modules() if isinstance(m, nn.GroupNorm)]
    assert len(groups) == 15
    alphas = {
        name: {m.alpha for m in model.modules() if isinstance(m, HasAlpha) and m.alpha is not None}
        for name, (model, _) in arms.items()
    }
    assert alphas == {**{name: set() for name in norms}, "preserve": {1.0}, "alpha0": {0.0}}
    x = noise(2, 3, 32, 32)
    original = arms["bn"][0].eval()(x)
    for name in ("frozen", "preserve", "folded"):
        assert torch.allclose(arms[name][0].eval()(x), original, atol=1e-5)
    assert {name: normfree.Plan.of(arms[name][0]).fused for name in ("preserve", "folded")} == {
        "preserve": False,
        "folded": True,
    }


def test_gains_of_the_pretrained_network_are_as_far_apart_as_they_were() -> None:
    model = normfree.convert(lite.pretrained())
    slots = [model.get_submodule(name) for name in model._normfree_plan.pairs.values()]
    gains = torch.cat([slot.gain_unit * slot.gain.abs() for slot in slots])
    assert (round(gains.min().item(), 2), int(gains.max())) == (0.01, 75)


def test_frozen_norms_stay_as_they_are_and_others_move() -> None:
    moved = {}
    for name in ("bn", "frozen"):
        model, frozen = finetune_table.network(name, OPTIONS, 2)
        before = {key: value.clone() for key, value in model.named_buffers()}
        finetune_table.fit(model, data(8), finetune_table.FINE_TUNING, lr=0.1, epochs=1, batch=4, seed=0, frozen=frozen)
        moved[name] = any(not torch.equal(value, before[key]) for key, value in model.named_buffers())
    assert moved == {"bn": True, "frozen": False}


def test_memory_of_a_step_is_that_of_its_batch() -> None:
    model, _ = finetune_table.network("preserve", OPTIONS, 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    few, many = (finetune_table.peak(model, data(images), 4, "cpu") for images in (4, 64))
    assert few == many
    large = finetune_table.peak(model, data(64), 64, "cpu")
    weights = sum(p.nbytes for p in model.parameters()) / 2**20
    assert few > 3 * weights, "parameters, gradients and momentum"
    assert large > 4 * (few - 3 * weights)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_run_says_how_long_an_epoch_took_unless_it_diverged() -> None:
    done = finetune_table.run("preserve", 4, data(8), OPTIONS, 0.1, 0)
    assert done.status == "trained"
    assert done.epoch_seconds is not None
    assert 0 < done.epoch_seconds < 30
    lost = finetune_table.run("bn", 4, data(8), OPTIONS, 2.0**126, 0)
    assert (lost.status, lost.epoch_seconds, lost.test) == ("diverged", None, None)


def test_tables_of_several_experiments_are_refused() -> None:
    row = {"network": "a", "size": "80", "epochs": "6", "arm": "bn", "batch": "2"}
    with pytest.raises(SystemExit, match="one network, size and number of epochs"):
        finetune_table.page([row, {**row, "size": "224"}])
