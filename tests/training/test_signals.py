"""Signals at residual sums: what De & Smith (NeurIPS 2020) say of batch norm, of none, and of SkipInit."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import normfree
from normfree.cli import app
from normfree.cli.signals import _flat
from normfree.errors import UsageError
from normfree.tracing.copying import deep_copy
from normfree.training.drawing import figure, plot
from normfree.training.signals import Moments, Signal, before_and_after

STAGES = (3, 4, 6, 3)


def noise() -> Tensor:
    return torch.randn(8, 3, 96, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def measured() -> dict[str, normfree.Signals]:
    """`resnetv2_50` with batch norm and He weights, with the norms deleted, and converted."""
    torch.manual_seed(0)
    return {title: normfree.signals(arm, noise()) for title, arm in before_and_after(timm.create_model("resnetv2_50"))}


def by_stage(values: list[float]) -> list[list[float]]:
    rest = iter(values)
    return [[next(rest) for _ in range(length)] for length in STAGES]


def test_branches_behind_batch_norm_bring_one_part_in_l_plus_one(measured: dict[str, normfree.Signals]) -> None:
    rows = measured["with its norms"].rows
    assert [row.name for row in rows[:2]] == ["stages.0.blocks.0.add", "stages.0.blocks.1.add"]
    shares = by_stage([row.share for row in rows])
    assert shares[2] == pytest.approx([0.509, 0.334, 0.247, 0.194, 0.168, 0.141], abs=0.025)
    for stage in shares:  # every transition starts anew
        assert stage == pytest.approx([1 / (number + 2) for number in range(len(stage))], abs=0.04)
    assert [row.branch.second for row in rows] == pytest.approx([1.0] * 16, abs=0.15)


def test_without_the_norms_the_signal_nearly_doubles_with_every_block(measured: dict[str, normfree.Signals]) -> None:
    sums = by_stage([row.total.second for row in measured["norms deleted"].rows])
    growth = [after / before for stage in sums for before, after in itertools.pairwise(stage)]
    assert len(growth) == 12
    assert statistics.geometric_mean(growth) == pytest.approx(1.86, abs=0.25)


def test_after_the_conversion_the_signal_is_flat(measured: dict[str, normfree.Signals]) -> None:
    rows = measured["converted (skipinit)"].rows
    assert len(rows) == 16
    assert {row.branch for row in rows} == {Moments(0.0, 0.0, 0.0)}
    assert all(row.total == row.skip for row in rows)
    sums = [row.total.second for row in rows]
    assert 0.4 < min(sums) / max(sums) <= 1, "the transitions keep it too"
    assert all(len(set(stage)) == 1 for stage in by_stage(sums))


def test_moments_of_channels() -> None:
    x = torch.tensor([[[1.0, 3.0], [0.0, 0.0]], [[1.0, 3.0], [2.0, -2.0]]])
    assert Moments.of(x) == Moments(second=(5 + 2) / 2, mean=(4 + 0) / 2, variance=(1 + 2) / 2)


class Branchy(nn.Module):
    """Two branches and an addition in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (
            nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1), nn.BatchNorm2d(3)) for _ in "ab"
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y += x
        return y + self.b(x)


def test_branches_are_measured_before_they_are_written_into() -> None:
    model, x = Branchy(), torch.randn(64, 3, 8, 8)
    (row,) = normfree.signals(model, x).rows
    assert row.skip.second == pytest.approx(x.square().mean().item(), rel=1e-5)
    assert row.branch.second == pytest.approx(2, rel=1e-3), "a and b bring one each"
    model.train()
    assert row.total.second == pytest.approx(model(x).square().mean().item(), rel=1e-5)


def test_model_and_random_state_are_left_alone() -> None:
    model = timm.create_model("resnetv2_18").eval()
    state, seed = deep_copy(model).state_dict(), torch.random.get_rng_state()
    normfree.signals(model)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not model.training
    assert torch.equal(torch.random.get_rng_state(), seed)


def test_what_has_no_residual_sum_says_so() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    with pytest.raises(UsageError, match="no residual sum of this Sequential ran"):
        normfree.signals(plain, torch.randn(2, 3, 4, 4))


def test_table_and_plot(measured: dict[str, normfree.Signals], tmp_path: Path) -> None:
    table = str(measured["with its norms"]).splitlines()
    assert table[0].startswith("sum ")
    assert table[0].endswith("share")
    assert table[1].split()[0] == "stages.0.blocks.0.add"
    assert len(table) == 17
    measured["with its norms"].plot(tmp_path / "one.svg")
    plot(measured, tmp_path / "three.svg", "timm:resnetv2_50")
    one, three = ((tmp_path / f"{name}.svg").read_text() for name in ("one", "three"))
    assert three.count('id="axes_') == 3 * one.count('id="axes_') == 6


def test_a_picture_counts_in_whole_numbers_and_tells_its_lines_apart(measured: dict[str, normfree.Signals]) -> None:
    nothing, some, tiny = (Moments(size, 0.0, size) for size in (0.0, 2.0, 1e-12))
    lost = Moments(float("inf"), 0.0, 0.0)
    rows = (Signal("a", some, nothing, some), Signal("b", some, tiny, some), Signal("c", lost, some, tiny))
    made = figure({"few": normfree.Signals(rows), "many": measured["norms deleted"]})
    made.draw_without_rendering()
    above, _, below, _ = made.axes
    for axis in made.axes:
        assert all(float(tick).is_integer() for tick in axis.get_xticks())
    assert above.get_legend_handles_labels()[1] == ["sum", "skip", "branch"]
    assert len({(line.get_linewidth(), line.get_linestyle()) for line in above.lines[:9:3]}) == 3
    low, high = above.get_ylim()
    assert low < 0 < 1e3 < high, "of both panels"
    shown = above.transData.transform([(1, 0.0), (1, 2.0)])[:, 1]
    assert shown[1] - shown[0] > 0.15 * above.bbox.height, "a value that is nearly zero leaves the others room"
    lost_at = [line for line in above.lines if line.get_marker() == "X" and len(line.get_xdata())]
    assert [(line.get_xdata(), line.get_color()) for line in lost_at] == [([3], "tab:blue")]
    assert below.get_ylim() == (-0.03, 1.03), "zero is not on the axis, and a share of 2e12 does not squeeze the rest"
    assert [list(line.get_xdata()) for line in below.lines if line.get_marker() == "^"] == [[3]]


def test_a_sum_of_zero_has_no_share_in_json() -> None:
    nothing = Moments(0.0, 0.0, 0.0)
    assert json.dumps(_flat(Signal("add", nothing, nothing, nothing)), allow_nan=False).endswith('"share": null}')


def test_command_draws_before_and_after(tmp_path: Path) -> None:
    arguments = ["signals", "timm:resnetv2_18", "--size", "64", "--batch", "4", "--plot", str(tmp_path / "s.png")]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["signals"]
    assert list(found) == ["with its norms", "norms deleted", "converted (skipinit)"]
    assert {len(rows) for rows in found.values()} == {8}
    assert {row["share"] for row in found["converted (skipinit)"]} == {0.0}
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
    shown = CliRunner().invoke(app, arguments[:6])
    assert shown.exit_code == 0
    assert shown.stdout.count("stages.0.blocks.0.add") == 3


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    for command in ("signals", "bench"):
        done = CliRunner().invoke(app, [command, "no such model", "--plot", "x.png"])
        assert done.exit_code == 2
        assert "needs matplotlib: pip install 'normfree[plot]'" in done.output
