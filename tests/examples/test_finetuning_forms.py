"""The study of forms trains each of them with each optimizer; each begins as the network that it comes from."""

from __future__ import annotations

import copy
import csv
from collections.abc import Iterator
from pathlib import Path

import finetuning_forms
import pytest
import torch
from finetuning_forms import ARMS, EPOCHS, RATES, WAYS, first_stages, form, fresh, images, page, pretrained
from images import Data
from nine_blocks import BLOCKS
from scripts import run_here


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A batch is enough to pretrain with."""

    def few(task: str, size: int, count: int) -> Data:
        return images(task, size, count or 32)

    monkeypatch.setattr(finetuning_forms, "images", few)
    pretrained.cache_clear()
    yield
    pretrained.cache_clear()


def test_a_study_grows_once_and_writes_its_page(tmp_path: Path) -> None:
    table = tmp_path / "forms.csv"
    short = ("--rates", 2.0**-7, 2.0**100, "--seeds", 2, "--epochs", 1, "--csv", table, "--optimizers", "sgd")
    said = []
    for _ in range(2):
        run_here("finetuning_forms.py", "--networks", "vgg", "--arms", "bn", "normfree", *short)
        said.append(table.read_text())
    assert said[0] == said[1]
    rows = list(csv.DictReader(said[0].splitlines()))
    assert len(rows) == 8
    assert {row["status"] for row in rows if row["arm"] == "normfree" and float(row["lr"]) > 1} == {"diverged"}
    run_here("finetuning_forms.py", "--render", "--csv", table)
    text = table.with_suffix(".md").read_text()
    assert "### vgg, digits 5 to 9, 16 px, sgd, batch 16; epochs: 1, seeds: 2" in text
    assert "|  | 2^-7 | 2^100 | best | at batch norm's best | within 2 points |" in text


def test_every_arm_and_optimizer_trains(tmp_path: Path) -> None:
    table = tmp_path / "forms.csv"
    short = ("--rates", 2.0**-12, "--seeds", 1, "--epochs", 1, "--csv", table)
    run_here("finetuning_forms.py", "--networks", "pre-activation", *short)
    network = ("--networks", "tf_efficientnet_lite0", "--tasks", "digits", "--size", 32, "--images", 4, "--batch", 2)
    run_here("finetuning_forms.py", *network, "--arms", "normfree", "--optimizers", "adamw", *short)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["status"] for row in rows] == ["trained"] * (len(ARMS) * len(RATES) + 1)


def test_what_is_frozen_stays_and_a_kept_head_goes_on(tmp_path: Path) -> None:
    table = tmp_path / "forms.csv"
    short = ("--rates", 2.0**-9, "--seeds", 1, "--epochs", 1, "--csv", table, "--optimizers", "sgd")
    for way in WAYS[1:]:
        run_here("finetuning_forms.py", "--networks", "vgg", "--arms", "bn", "normfree", "--way", way, *short)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [(row["way"], row["task"], row["status"]) for row in rows] == [
        *[("last stage", "digits 5 to 9", "trained")] * 2,
        *[("kept head", "digits 0 to 4, negative", "trained")] * 2,
    ]


@pytest.mark.parametrize("network", ["pre-activation", "vgg"])
def test_only_the_last_stage_learns(network: str) -> None:
    model, _ = form("normfree", fresh(network, 5, 0, "last stage"), torch.zeros(1, 1, 16, 16))
    learns = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert [str(i) for i in range(len(model)) if str(i) not in first_stages(network)][:3] == sorted(learns, key=int)[:3]
    assert not learns & set(first_stages(network))


def test_a_kept_head_is_the_pretrained_one() -> None:
    assert torch.equal(fresh("vgg", 5, 0, "kept head")[-1].weight, pretrained("vgg")[-1].weight)
    assert not torch.equal(fresh("vgg", 5, 0)[-1].weight, pretrained("vgg")[-1].weight)


@pytest.mark.parametrize("network", BLOCKS)
def test_every_arm_begins_as_the_original(network: str) -> None:
    model = fresh(network, 5, 0).double()
    x = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(x)
        for name in ARMS:
            made, _ = form(name, copy.deepcopy(model), x)
            torch.testing.assert_close(made.eval()(x), expected, rtol=1e-9, atol=1e-9)


def test_a_page_says_what_diverged_and_what_is_missing() -> None:
    settings = {"network": "vgg", "task": "t", "size": "16", "images": "0", "way": "whole"}
    settings |= {"optimizer": "sgd", "batch": "16"}
    row = {**settings, "epochs": str(EPOCHS["vgg"]), "validation": "0.9", "test": "0.8", "status": "trained"}
    runs = [("bn", "0.5", "0"), ("bn", "0.5", "1"), ("bn", "0.25", "0"), ("normfree", "0.5", "0")]
    table = [{**row, "arm": name, "lr": lr, "seed": seed} for name, lr, seed in runs]
    table[1] |= {"validation": "", "test": "", "status": "diverged"}
    lines = page(table).splitlines()
    assert lines[-2] == "| batch norm | 80.0 n=1 | 40.0 [0.0] | 80.0 n=1 (2^-2) | 80.0 n=1 | 2^-2 .. 2^-2 |"
    assert lines[-1] == "| normfree |  | 80.0 n=1 | 80.0 n=1 (2^-1) |  | 2^-1 .. 2^-1 |"
