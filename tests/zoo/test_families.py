"""The plan finds the sums that reading the code finds, in one member of each architecture family."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from families import FAMILIES, Family
from marks import broad

import normfree
from normfree import zoo

KINDS = {(f.source.split(":")[0], f.residual > 0, f.parallel > 0, f.merge > 0): f for f in reversed(FAMILIES)}
"""The first family of each library with each kind of sums."""
FEW = list(KINDS.values())


@pytest.mark.parametrize(
    "family", FEW + broad(*(f for f in FAMILIES if f not in FEW)), ids=lambda family: family.source
)
def test_the_plan_finds_the_sums_that_the_code_has(family: Family) -> None:
    with torch.device(family.device):
        model = zoo.build(zoo.find(family.source))
    plan = normfree.plan(model, init="skipinit")
    kinds = Counter(total.kind for total in plan.sums if total.name.startswith(family.within))
    found = (kinds["residual"], kinds["parallel"], kinds["merge"])
    assert found == (family.residual, family.parallel, family.merge), family.derivation
    elsewhere = [total for total in plan.sums if not total.name.startswith(family.within)]
    assert not any(total.alphas or total.declined for total in elsewhere)


def test_the_list_spans_many_model_files() -> None:
    assert len({family.file for family in FAMILIES}) >= 40


def test_the_list_names_each_model_once_and_says_how_it_was_counted() -> None:
    assert len({family.source for family in FAMILIES}) == len(FAMILIES)
    assert all(family.derivation for family in FAMILIES)
