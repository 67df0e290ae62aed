"""The benchmark: what it counts is right, what it times is interleaved, what it writes can be read."""

from __future__ import annotations

import csv
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from harness import Block, noise
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from normfree.bench import Setting, Spread, arm_names, run
from normfree.bench.arms import ARMS, Subject, build_arms
from normfree.bench.measures import Step, largest_batch, operators, saved_bytes
from normfree.bench.results import COLUMNS
from normfree.cli import app
from normfree.errors import UsageError

SUBJECT = Subject(
    "torchvision:tiny", nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), Block()), "skipinit"
)


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def step_of(model: nn.Module) -> Step:
    return Step(model, torch.optim.SGD(model.parameters(), lr=0.0))


def test_saved_bytes_are_what_autograd_keeps() -> None:
    # A convolution keeps its input, a ReLU in place its output: 3 and 4 channels of 8 x 8 floats.
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True))
    assert saved_bytes(model, noise(2, 3, 8, 8)) == (4 * 64 * (3 + 4), 0)


def test_saved_constant_is_the_combined_weight() -> None:
    converted = build_arms(SUBJECT, ("normfree",))["normfree"]
    _, constant = saved_bytes(converted, noise(2, 3, 8, 8))
    assert constant == converted[2].conv2.weight.nbytes


def test_arms_differ_in_what_they_save() -> None:
    arms = build_arms(SUBJECT, ("bn", "activation", "normfree", "bare"))
    x = noise(4, 3, 16, 16)
    image = {name: saved_bytes(arm, x)[0] for name, arm in arms.items()}
    assert image["normfree"] == image["bare"] < image["activation"] < image["bn"]


def test_alpha_on_the_weight_touches_no_activation() -> None:
    arms = build_arms(SUBJECT, ("bn", "activation", "normfree", "bare"))
    x = noise(2, 3, 16, 16)
    counted = {name: operators(step_of(arm), x) for name, arm in arms.items()}
    touching = {name: activations for name, (_, activations) in counted.items()}
    assert touching["normfree"] == touching["bare"] < touching["activation"] < touching["bn"]
    assert counted["normfree"][0] > counted["bare"][0], "it combines weights"


def test_every_arm_computes_what_it_says() -> None:
    arms = build_arms(SUBJECT, tuple(ARMS))
    assert list(arms) == ["bn", "frozen", "groupnorm", "activation", "normfree", "biases", "bare"], "no nf_tiny in timm"
    kinds = {name: {type(m).__name__ for m in arm.modules()} for name, arm in arms.items()}
    assert "BatchNorm2d" in kinds["bn"] & kinds["frozen"]
    assert not arms["frozen"][1].training
    assert arms["bn"][1].training
    assert "GroupNorm" in kinds["groupnorm"]
    assert "ChannelAffine" in kinds["activation"]
    assert "ScaledConv2d" in kinds["normfree"]
    assert not any("Scaled" in kind or "Norm" in kind for kind in kinds["bare"])
    names = {name: {key.rpartition(".")[2] for key, _ in arm.named_parameters()} for name, arm in arms.items()}
    assert names["bare"] == {"weight"}
    assert names["biases"] == {"weight", "bias"}
    assert len(list(arms["biases"].parameters())) == len(list(arms["normfree"].parameters())) - 1, "alpha"


@pytest.mark.parametrize("init", ["skipinit", "preserve"])
def test_activation_arm_computes_what_normfree_computes(init: Any) -> None:
    torch.manual_seed(0)
    one = build_arms(Subject(SUBJECT.source, SUBJECT.model, init), ("normfree",))["normfree"]
    torch.manual_seed(0)
    other = build_arms(Subject(SUBJECT.source, SUBJECT.model, init), ("activation",))["activation"]
    x = noise(2, 3, 16, 16)
    assert torch.allclose(one(x), other(x), atol=1e-6)


def test_timms_nf_model_is_found_for_both_libraries() -> None:
    for source in ("timm:resnet50.a1_in1k", "torchvision:resnet50"):
        with torch.device("meta"):
            arm = ARMS["nf"](Subject(source, SUBJECT.model, "skipinit"))
        assert arm is not None
        assert type(arm) is timm.models.NormFreeNet


def test_run_measures_every_arm_in_the_same_rounds() -> None:
    said: list[str] = []
    setting = Setting(batch=2, size=16, runs=3, arms=("bn", "normfree", "bare"))
    results = run(SUBJECT.source, SUBJECT.model, setting, said.append)
    assert [result.arm for result in results] == ["bn", "normfree", "bare"]
    assert {other for result in results for other in result.step_to} == {"bn", "normfree", "bare"}
    for result in results:
        assert result.step_ms is not None
        assert result.forward_ms is not None
        assert min(result.forward_ms.median, result.step_ms.median) > 0  # which is larger a busy machine decides
        assert result.step_ms.low <= result.step_ms.median <= result.step_ms.high
        assert result.kernels is result.peak_bytes is result.largest_batch is None, "there is no GPU here"
    assert said[-3:] == ["round 1 of 3", "round 2 of 3", "round 3 of 3"]
    assert sum(p.numel() for p in SUBJECT.model.parameters()) == 12 * 9 + 8 + 2 * (144 + 8), "the model is as it was"


def test_without_rounds_only_what_does_not_depend_on_the_clock_is_counted() -> None:
    done = bench("timm:test_resnet", "--size", 32, "--runs", 0, "--arms", "normfree,bare", "--json")
    assert done.exit_code == 0, done.output
    ours, bare = json.loads(done.stdout)["rows"]
    assert ours["step_ms"] is ours["to_bare"] is None
    # Where there are few places the scalar multiplies what comes out, and keeps it for its gradient.
    assert bare["saved_mib_per_image"] <= ours["saved_mib_per_image"] < 1.2 * bare["saved_mib_per_image"]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.broad)])
def test_compiled_channels_last_and_autocast(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    setting = Setting(batch=2, size=16, runs=1, dtype="bf16", compiled=True, channels_last=True, arms=("normfree",))
    (result,) = run(SUBJECT.source, SUBJECT.model, setting)
    assert result.step_ms is not None
    assert result.step_ms.median > 0
    full = run(SUBJECT.source, SUBJECT.model, Setting(batch=2, size=16, runs=1, arms=("normfree",)))[0]
    assert result.saved_per_image < full.saved_per_image, "activations take half the bytes in bf16"


def test_no_arm_falls_back_to_eager_because_others_were_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        results = run(SUBJECT.source, SUBJECT.model, Setting(batch=2, size=16, runs=1, compiled=True))
    assert len(results) == 7


def test_largest_batch_is_the_last_power_of_two_that_fits() -> None:
    tried: list[int] = []

    def step(x: Tensor) -> None:
        tried.append(x.shape[0])
        if x.shape[0] > 20:
            raise torch.OutOfMemoryError

    assert largest_batch(step, noise(3, 3, 2, 2)) == 16
    assert tried == [2, 4, 8, 16, 32]
    assert largest_batch(lambda _: None, noise(1, 3, 2, 2), limit=8) == 8


def test_spread_is_median_and_quartiles() -> None:
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 100.0]) == Spread(3.0, 2.0, 4.0)
    assert f"{Spread.of([2.5]):.1f}" == "2.5 (2.5 - 2.5)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "tpu"}, "it must be cpu or cuda"),
        ({"dtype": "fp8"}, "it must be one of fp32, bf16, fp16"),
        ({"init": "auto"}, "it must be skipinit or preserve"),
        ({"batch": 0}, "a batch of at least 1"),
        ({"runs": -1}, "no fewer than 0 runs"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Setting(**change)


def test_unknown_arms_are_named() -> None:
    assert arm_names("bn, bare,bn") == ("bn", "bare")
    with pytest.raises(UsageError, match="unknown arms layernorm; known: bn, frozen"):
        arm_names("bn,layernorm")


def test_command_line_writes_table_csv_json_and_plot(tmp_path: Path) -> None:
    rows, plot = tmp_path / "rows.csv", tmp_path / "plot.png"
    short = ("timm:test_resnet", "--batch", 2, "--size", 32, "--runs", 1, "--arms", "bn,normfree,bare")
    done = bench(*short, "--csv", rows, "--plot", plot, "--json")
    assert done.exit_code == 0, done.output
    body = json.loads(done.stdout)
    with rows.open() as file:
        table = list(csv.DictReader(file))
    assert [row["arm"] for row in table] == [row["arm"] for row in body["rows"]] == ["bn", "normfree", "bare"]
    assert list(table[0]) == COLUMNS
    assert float(table[1]["saved_mib_per_image"]) < float(table[0]["saved_mib_per_image"])
    assert body["step_to"]["normfree"]["bare"] == pytest.approx(float(table[1]["to_bare"]))
    assert plot.read_bytes().startswith(b"\x89PNG")
    shown = bench(*short)
    assert shown.exit_code == 0
    assert "model timm:test_resnet, init skipinit, batch 2" in shown.stdout
    assert "saved MiB/image" in shown.stdout


def test_a_batch_of_one_is_measured_where_batch_norm_takes_it() -> None:
    arms = ("bn", "normfree", "bare")
    results = run(SUBJECT.source, SUBJECT.model, Setting(batch=1, size=16, runs=1, arms=arms))
    assert all(result.step_ms is not None for result in results)
    narrow = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten())
    with pytest.raises(UsageError, match="batch norm refuses"):
        run("narrow", narrow, Setting(batch=1, size=3, runs=1, arms=arms))


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(("--arms", "wrong"), 2), (("--device", "cuda", "--batch", "0"), 2), (("--runs", "-1"), 2), (("nothing",), 2)],
)
def test_command_line_refuses_wrong_usage(arguments: tuple[str, ...], code: int) -> None:
    assert bench(*(() if arguments == ("nothing",) else ("torchvision:resnet18",)), *arguments).exit_code == code
