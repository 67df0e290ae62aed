"""The support table says what is true: every model is planned again, the smallest of every file proved again."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import support_table
import torch
import unusual_inputs
from harness import randomise
from marks import broad
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

ROWS = support_table.table()
# Another version of a library may have other models, and others under the same name.
SAME_VERSIONS = all(row["versions"] in ("", support_table.VERSIONS) for row in ROWS.values())
NAMES = [name for name in support_table.names() if SAME_VERSIONS or name in ROWS]
CHUNK = 20
FEW = NAMES[:: len(NAMES) // 15]
CHUNKS = [NAMES[start : start + CHUNK] for start in range(0, len(NAMES), CHUNK)]
SMALLEST = support_table.smallest([row for row in ROWS.values() if row["model"] in NAMES])
BY_SIZE = sorted(SMALLEST, key=lambda name: int(ROWS[name]["parameters"]))


def _structure(name: str) -> dict[str, Any] | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the libraries' own models
        structure: dict[str, Any] | None = support_table.structure(name)
        return structure


@pytest.mark.parametrize("names", [FEW, *broad(*CHUNKS)], ids=lambda names: names[0])
def test_every_model_is_planned_as_the_table_says(names: list[str]) -> None:
    wrong = []
    for name in names:
        planned, row = _structure(name), ROWS.get(name)
        if planned is None or row is None:
            if (planned is None) != (row is None):
                wrong.append(f"{name}: {'no norm any more' if planned is None else 'not in the table'}")
            continue
        wrong += [
            f"{name}: {k} {planned[k]}, was {row[k]}" for k in support_table.STRUCTURE if str(planned[k]) != row[k]
        ]
    assert wrong == [], "renew the table: python examples/experiments/support_table.py"


@pytest.mark.parametrize("name", BY_SIZE[:2] + broad(*BY_SIZE[2:]))
def test_smallest_model_of_every_file_is_proved_as_the_table_says(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the libraries' own models
        assert support_table.proofs(name)["status"] == ROWS[name]["status"]


def test_no_network_of_the_table_fails_or_declines_a_branch() -> None:
    assert len(ROWS) > 800
    assert {row["status"] for row in ROWS.values()} <= {"ok", ""}, "planned only, or every proof holds"
    assert sum(row["status"] == "ok" for row in ROWS.values()) >= 834
    assert sum(int(row["declined"]) for row in ROWS.values()) == 0


def test_page_is_rendered_from_the_table() -> None:
    rows = sorted(ROWS.values(), key=lambda row: (row["file"], row["model"]))
    page = support_table.PAGE.read_text().splitlines()
    said = "\n".join(support_table.page(rows)).splitlines()
    assert [line for line in page if line.startswith("|")] == [line for line in said if line.startswith("|")]


def test_what_a_run_plans_and_measures_is_merged_into_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support_table, "TABLE", tmp_path / "support.csv")
    monkeypatch.setattr(support_table, "PAGE", tmp_path / "support.md")
    monkeypatch.setattr(support_table, "measure", lambda name, planned: planned | {"status": "ok", "seconds": 1})
    names, work = ["timm:test_resnet", "timm:test_efficientnet", "timm:test_vit"], tmp_path / "work"
    support_table.run(names, {"timm:test_efficientnet"}, "0/1", work)
    assert list(support_table.measured(work)) == ["timm:test_resnet"], "the table holds the other one already"
    support_table.render(work)
    table = support_table.table()
    assert {name: row["status"] for name, row in table.items()} == {
        "timm:test_efficientnet": "",
        "timm:test_resnet": "ok",
    }
    assert "| timm:test_resnet |" in support_table.PAGE.read_text()


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning")  # raw outputs are measured
@pytest.mark.filterwarnings("ignore::normfree.conversion.FrozenWarning")  # torchvision freezes the first layers
def test_small_detector_is_proved() -> None:
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=torch.nn.BatchNorm2d)
    detector = randomise(FasterRCNN(backbone, num_classes=3))
    row = unusual_inputs.verify_detector(detector)
    assert unusual_inputs.verifier(detector) is unusual_inputs.verify_detector
    assert row["status"] == "ok"
    assert float(row["preserve_error"]) < 1e-9


def test_wrong_conversion_of_a_detector_is_reported() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    one, two = torch.ones(2), torch.ones(2) * 1.001
    spy = unusual_inputs.NormSpy([], ["the norm"])
    spy.seen.append("the norm")
    said = unusual_inputs.verdict(model, torch.ones(3, 4, 4), ([one], [two]), ([one], [one[:1]]), 1e-5, spy)["status"]
    for what in ("preserve proof 3", "norms left ['1']", "a norm runs in ['the norm']", "proof 2: inf", "proof 5"):
        assert what in said


def test_networks_for_large_images_are_built_for_small_ones() -> None:
    small = support_table.smaller("timm:maxvit_rmlp_pico_rw_256")
    assert small is not None
    assert support_table.fitting(small).shape[2:] == (64, 64)
    assert support_table.smaller("timm:test_resnet") is None, "no argument of it"
    assert support_table.smaller("torchvision:resnet18") is None
