"""The experiments measure what they say: same seed, same result; what diverged is said to; a table goes on."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import experiment
import find_recipe
import finetune_table
import images
import learning_rate_regimes
import outcomes
import pytest
import recipe
import torch
import train_from_scratch
import trainable_depth
from harness import noise
from images import Data, Part
from marks import broad
from recipe import Outcome, Recipe
from torch import nn

import normfree
from normfree import zoo

DATA = images.digits()
SMALL = replace(DATA, train=Part(DATA.train.x[:128], DATA.train.y[:128]))
OUTCOME = Outcome(0.5, 0.25, 1.0, "2 1", "trained")
LOST = Outcome(None, None, 1.0, "nan", "diverged")


def trained(lr: float = 0.1, seed: int = 0, with_recipe: Recipe = recipe.RECIPE) -> Outcome:
    torch.manual_seed(seed)
    model = trainable_depth.arm("skipinit", trainable_depth.network("post-activation", 8, SMALL))
    return recipe.train(model, SMALL, with_recipe, lr=lr, epochs=2, batch=32, seed=seed)


def test_same_seed_same_result() -> None:
    one, same, other = trained(), trained(), trained(seed=1)
    assert (one.curve, one.validation, one.test) == (same.curve, same.validation, same.test)
    assert one.curve != other.curve
    assert one.status == "trained"


def test_a_run_that_is_not_finite_is_stopped_and_has_diverged() -> None:
    lost = trained(lr=1e12, with_recipe=Recipe())
    assert (lost.status, lost.validation, lost.test) == ("diverged", None, None)
    assert math.isnan(float(lost.curve.split()[-1]))


def test_training_learns() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    outcome = recipe.train(model, replace(DATA, shift=0), recipe.BN_RECIPE, lr=0.1, epochs=4, batch=64, seed=0)
    assert outcome.test is not None
    assert outcome.test > 0.9
    first, last = (float(outcome.curve.split()[i]) for i in (0, -1))
    assert last < first / 2


@pytest.mark.parametrize("bf16", [False, True])
def test_shifted_images_in_colour_train_in_either_type(bf16: bool) -> None:
    colour = replace(SMALL, train=Part(SMALL.train.x.expand(-1, 3, -1, -1), SMALL.train.y))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10))
    first, *_, last = recipe.fit(model, colour, recipe.BN_RECIPE, lr=0.01, epochs=16, batch=16, seed=0, bf16=bf16)
    assert last < 0.8 * first
    assert model[0].weight.dtype is torch.float32
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last) is bf16


@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_learning_rate_rises_and_falls(warmup: float) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule, rates = recipe.cosine(optimizer, warmup, 20), []
    for step in range(1, 21):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    top = round(20 * warmup)
    assert rates[:top] == pytest.approx([2.0 * i / top for i in range(1, top)] + [2.0] * (top > 0))
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0
    assert max(rates) <= 2.0


@pytest.mark.parametrize(("clip", "norm"), [("none", 10.0), ("norm:1", 1.0), ("agc:0.1", 1.0)])
def test_clipping(clip: str, norm: float) -> None:
    model = nn.Conv2d(1, 1, 10, bias=False)
    assert model.weight.grad is None
    with torch.no_grad():
        model.weight.fill_(1.0)
    model.weight.grad = torch.ones_like(model.weight)
    Recipe(clip=clip).clipper()(model)
    assert model.weight.grad.norm().item() == pytest.approx(norm, rel=1e-4)


def test_unknown_clipping_is_refused() -> None:
    with pytest.raises(ValueError, match="clip is none, norm:NUMBER or agc:NUMBER, not value:1"):
        Recipe(clip="value:1").clipper()


def test_parts_share_no_image_and_are_always_the_same() -> None:
    x, y = torch.arange(100.0).reshape(-1, 1, 1, 1), torch.arange(100)
    one, same = images.split(x, y), images.split(x, y)
    parts = [part.y.tolist() for part in (one.train, one.validation, one.test)]
    assert list(map(len, parts)) == [60, 20, 20]
    assert sorted(i for part in parts for i in part) == list(range(100))
    assert parts[0][:3] == [26, 86, 2], "the published split"
    assert same.train.y.tolist() == parts[0]
    assert one.train.x.mean().abs() < 1e-5
    assert one.train.x.std() == pytest.approx(1.0)


def test_shifting_moves_whole_images_by_a_pixel_at_most() -> None:
    torch.manual_seed(0)
    x = torch.zeros(200, 2, 5, 6)
    x[:, 0, 2, 3], x[:, 1, 2, 3] = 1.0, 2.0
    y = recipe.shifted(x, 1)
    assert y.shape == x.shape
    places = {tuple(image.nonzero().flatten().tolist()) for image in y[:, 0]}
    assert places == {(row, column) for row in (1, 2, 3) for column in (2, 3, 4)}
    assert torch.equal(y[:, 1], 2 * y[:, 0])


def test_mirroring_moves_pixels_within_their_image() -> None:
    torch.manual_seed(0)
    x = noise(64, 1, 4, 4)
    y = recipe.mirrored(x)
    kinds = [x, x.flip(2), x.flip(3), x.flip(2, 3)]
    counts = [sum(torch.equal(a, b) for a, b in zip(y, kind, strict=True)) for kind in kinds]
    assert sum(counts) == 64
    assert min(counts) > 4


def test_table_goes_on_where_it_was(tmp_path: Path) -> None:
    calls: list[object] = []

    def run() -> Outcome:
        calls.append(1)
        return OUTCOME

    path = tmp_path / "deep" / "table.csv"
    settings = {"arm": "a, b", "lr": 0.5}
    row = experiment.measured(path, settings, run)
    assert experiment.measured(path, settings, run) == row == experiment.rows(path)[0]
    assert calls == [1]
    assert row["arm"] == "a, b"
    assert (experiment.accuracy(row, "validation"), experiment.accuracy(row, "test")) == (50.0, 25.0)


def test_a_killed_process_loses_only_its_own_run(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    for lr in (1.0, 2.0):
        experiment.measured(path, {"lr": lr}, lambda: OUTCOME)
    path.write_text(path.read_text()[:-12])
    assert [row["lr"] for row in experiment.rows(path)] == ["1.0"]
    for lr in (1.0, 2.0):
        experiment.measured(path, {"lr": lr}, lambda: OUTCOME)
    assert [row["lr"] for row in experiment.rows(path)] == ["1.0", "2.0"]


def test_study_repeats_the_rate_that_validates_best(tmp_path: Path) -> None:
    good = {1.0: 0.5, 2.0: 0.75}

    def run(lr: float, seed: int) -> Outcome:
        return replace(OUTCOME, validation=good[lr], test=good[lr] - seed / 10) if lr in good else LOST

    path = tmp_path / "table.csv"
    experiment.study(path, [experiment.Study({"arm": "bn"}, run)], [1.0, 2.0, 4.0], 3)
    table = experiment.rows(path)
    assert [(row["lr"], row["seed"]) for row in table] == [
        ("1.0", "0"),
        ("2.0", "0"),
        ("4.0", "0"),
        ("2.0", "1"),
        ("2.0", "2"),
    ]
    assert [row["status"] for row in table] == ["trained", "trained", "diverged", "trained", "trained"]
    assert str(experiment.summary(table, {"arm": "bn"})) == "65.0 ± 10.0 (2^1)"
    assert experiment.summary(table, {"arm": "other"}) is None


def test_what_diverges_at_every_rate_is_said_to(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    experiment.study(path, [experiment.Study({"arm": "deleted"}, lambda lr, seed: LOST)], [1.0, 2.0], 3)
    table = experiment.rows(path)
    assert len(table) == 2, "no more seeds"
    assert str(experiment.summary(table, {"arm": "deleted"})) == "diverges"


@pytest.fixture(params=["threads", *broad("processes")])
def _several_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads stand in for processes, which import torch anew."""
    if request.param == "threads":
        monkeypatch.setattr(experiment, "ProcessPoolExecutor", lambda workers, _context: ThreadPoolExecutor(workers))


@pytest.mark.usefixtures("_several_at_once")
def test_several_processes_write_the_same_table(tmp_path: Path) -> None:
    alone, together = tmp_path / "alone.csv", tmp_path / "together.csv"
    cells = [experiment.Study({"arm": arm}, partial(outcomes.recorded, arm)) for arm in ("bn", "deleted", "skipinit")]
    experiment.study(alone, cells, [1.0, 2.0], 3)
    experiment.study(together, cells, [1.0, 2.0], 3, workers=3)
    rows = [sorted(tuple(row.values()) for row in experiment.rows(path)) for path in (alone, together)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 3 * 2 + 2 * 2, "what diverges has no more seeds"
    order = [row["seed"] for row in experiment.rows(alone)]
    assert order == ["0", "0", "1", "2", "0", "0", "0", "0", "1", "2"], "a cell is finished before the next is begun"


@pytest.mark.usefixtures("_several_at_once")
def test_an_error_in_another_process_is_raised_here(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="other"):
        experiment.study(tmp_path / "t.csv", [experiment.Study({}, partial(outcomes.recorded, "other"))], [1.0], 1, 2)


@pytest.mark.parametrize("kind", trainable_depth.KINDS)
def test_networks_have_the_depth_they_say(kind: str) -> None:
    for depth in (16, 18, 100):
        model = trainable_depth.network(kind, depth, DATA)
        layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m.weight.shape[-1] != 1]
        on_the_way = [m for m in layers if isinstance(m, nn.Conv2d)]
        assert len(on_the_way) == depth - 1, "3 x 3 convolutions: all layers but the classifier"


@pytest.mark.parametrize("kind", trainable_depth.KINDS)
def test_arms_are_what_they_say(kind: str) -> None:
    x = noise(4, 1, 8, 8)
    models: dict[str, Any] = {}
    for name in trainable_depth.ARMS:
        torch.manual_seed(0)
        models[name] = trainable_depth.arm(name, trainable_depth.network(kind, 16, DATA)).eval()
    alphas = {
        name: [(p.item(), p.requires_grad) for key, p in model.named_parameters() if key.endswith("alpha")]
        for name, model in models.items()
    }
    assert alphas["bn"] == []
    assert alphas["skipinit"] == [(0.0, True)] * 7
    assert alphas["rsqrt_depth"] == [(pytest.approx(7**-0.5), True)] * 7
    assert alphas["deleted"] == alphas["unclipped"] == alphas["sqrt2"] == [(1.0, False)] * 7
    shrunk, deleted = models["sqrt2"], models["deleted"]
    assert not torch.allclose(shrunk(x), deleted(x))
    with torch.no_grad():
        blocks = [m for m in deleted.modules() if type(m).__name__ in ("PreActBasic", "BasicBlock")]
        for block in blocks:
            block.register_forward_hook(lambda module, args, output: output / 2**0.5)
    assert len(blocks) == 7
    assert torch.allclose(shrunk(x), deleted(x)), "every block is divided, once"


@pytest.mark.parametrize(("size", "low", "high"), [(8, 0.75, 0.87), (32, 0.93, 1.0)])
def test_divided_blocks_keep_the_signal_only_of_large_images(size: int, low: float, high: float) -> None:
    """Zeros around 8 x 8 pixels take a share of the branch that those around 32 x 32 do not: so the results explain."""
    model = trainable_depth.arm("sqrt2", trainable_depth.network("pre-activation", 100, DATA, 16))
    moments: list[float] = []
    for module in model.modules():
        if type(module).__name__ == "PreActBasic":
            module.register_forward_hook(lambda _module, _args, output: moments.append(output.square().mean().item()))
    with torch.no_grad():
        model(noise(8, 1, size, size))
    assert len(moments) == 49
    assert low < (moments[-1] / moments[0]) ** (1 / 48) < high


def test_range_is_around_the_best_and_has_no_gap() -> None:
    assert experiment.within_a_point({1.0: 99, 2.0: 97, 4.0: 99, 8.0: 98, 16.0: 98.5, 32.0: 90}) == [1.0]
    assert experiment.within_a_point({1.0: 97, 2.0: 98.5, 4.0: 99, 8.0: 98, 16.0: 90}) == [2.0, 4.0, 8.0]


def test_usable_rates_are_around_the_best() -> None:
    table = [
        {"arm": "bn", "batch": "2", "seed": "0", "lr": str(lr), "validation": str(share), "status": "trained"}
        for lr, share in ((0.125, 0.8), (0.25, 0.805), (0.5, 0.7))
    ]
    assert experiment.usable(table, {"arm": "bn", "batch": 2}) == "2^-3 .. 2^-2"
    assert experiment.usable(table, {"arm": "bn", "batch": 8}) is None


def test_arms_from_scratch() -> None:
    data = Data(Part(9 * noise(64, 3, 32, 32), torch.zeros(64)), DATA.validation, DATA.test, 2)
    source = zoo.find("timm:test_efficientnet")
    torch.manual_seed(0)
    kinds = {
        arm: {type(m).__name__ for m in train_from_scratch.network(source, arm, data).modules()}
        for arm in train_from_scratch.ARMS
    }
    assert {arm: {k for k in found if "Norm" in k} for arm, found in kinds.items()} == {
        "bn": {"BatchNormAct2d"},
        "groupnorm": {"GroupNorm"},
        "normfree": set(),
    }
    model = train_from_scratch.network(source, "normfree", data)
    first = model.conv_stem(data.train.x).var().item()
    assert first == pytest.approx(1, rel=0.01), "no skip path protects it: it is calibrated"
    assert normfree.plan(zoo.build(source)).norms


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("recipe", find_recipe),
        ("trainable_depth", trainable_depth),
        ("learning_rate_regimes", learning_rate_regimes),
        ("train_from_scratch", train_from_scratch),
        ("finetune", finetune_table),
        ("finetune_224", finetune_table),
    ],
)
def test_page_is_written_from_its_table(name: str, module: Any) -> None:
    path = experiment.RESULTS / f"{name}.csv"
    table = experiment.rows(path)
    assert len(table) > 10
    assert path.with_suffix(".md").read_text() == module.page(table)
