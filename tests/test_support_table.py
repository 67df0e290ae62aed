"""The support table says what is true: every model is planned again, the smallest of every file proved again."""

from __future__ import annotations

import csv
import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def _script() -> ModuleType:
    sys.path.insert(0, str(EXAMPLES))  # the script imports its neighbour
    try:
        spec = importlib.util.spec_from_file_location("support_table", EXAMPLES / "support_table.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(EXAMPLES))


script = _script()
with script.TABLE.open(newline="") as _file:
    ROWS = {row["model"]: row for row in csv.DictReader(_file)}
# Another version of a library may have other models, and others under the same name.
SAME_VERSIONS = all(row["versions"] in ("", script.VERSIONS) for row in ROWS.values())
NAMES = [name for name in script.names() if SAME_VERSIONS or name in ROWS]
CHUNK = 20


def _structure(name: str) -> dict[str, Any] | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the libraries' own models
        structure: dict[str, Any] | None = script.structure(name)
        return structure


@pytest.mark.parametrize("start", range(0, len(NAMES), CHUNK), ids=lambda i: NAMES[i])
def test_every_model_is_planned_as_the_table_says(start: int) -> None:
    wrong = []
    for name in NAMES[start : start + CHUNK]:
        planned, row = _structure(name), ROWS.get(name)
        if planned is None or row is None:
            if (planned is None) != (row is None):
                wrong.append(f"{name}: {'no norm any more' if planned is None else 'not in the table'}")
            continue
        wrong += [f"{name}: {k} {planned[k]}, was {row[k]}" for k in script.STRUCTURE if str(planned[k]) != row[k]]
    assert wrong == [], "renew the table: python examples/support_table.py"


def _smallest_of_every_file() -> list[str]:
    smallest: dict[str, dict[str, str]] = {}
    for row in ROWS.values():
        if row["model"] in NAMES and row["status"]:
            known = smallest.setdefault(row["file"], row)
            if int(row["parameters"]) < int(known["parameters"]):
                smallest[row["file"]] = row
    return [row["model"] for row in smallest.values()]


@pytest.mark.parametrize("name", _smallest_of_every_file())
def test_smallest_model_of_every_file_is_proved_as_the_table_says(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the libraries' own models
        assert script.proofs(name)["status"] == ROWS[name]["status"]


def test_no_network_of_the_table_fails_or_declines_a_branch() -> None:
    assert len(ROWS) > 800
    assert {row["status"] for row in ROWS.values()} <= {"ok", ""}, "planned only, or every proof holds"
    assert sum(row["status"] == "ok" for row in ROWS.values()) >= 314
    assert sum(int(row["declined"]) for row in ROWS.values()) == 0


def test_page_is_rendered_from_the_table() -> None:
    rows = sorted(ROWS.values(), key=lambda row: (row["file"], row["model"]))
    page = script.PAGE.read_text().splitlines()
    said = "\n".join(script.page(rows)).splitlines()
    assert [line for line in page if line.startswith("|")] == [line for line in said if line.startswith("|")]
