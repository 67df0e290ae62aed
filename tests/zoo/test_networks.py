"""All six proofs from both starting points: on a small network of every kind, and on those that people use."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from harness import randomise
from networks import NETWORKS, Network
from structures import STRUCTURES, Structure

import normfree
from normfree.norms import is_norm


@pytest.mark.parametrize("kind", STRUCTURES)
def test_every_proof_holds_on_every_kind_of_structure(kind: str) -> None:
    hold(STRUCTURES[kind])


@pytest.mark.broad
@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.source)
def test_every_proof_holds_on_the_networks_that_people_use(network: Network) -> None:
    hold(network)


def hold(network: Network | Structure) -> None:
    original = network.build()
    randomise(original)
    before = copy.deepcopy(original.state_dict())
    x = network.inputs()

    plan = normfree.plan(original, init="skipinit")
    kinds = Counter(total.kind for total in plan.sums)
    assert (kinds["residual"], kinds["parallel"], kinds["merge"]) == network.sums
    assert len(plan.alphas) == (network.sums[0] if network.scaled is None else network.scaled)
    assert plan.declined == ()

    for init, start in (("skipinit", 0.0), ("preserve", 1.0)):
        converted = normfree.convert(original, init=init)
        assert type(converted) is type(original)
        assert not any(is_norm(module) for module in converted.modules())
        alphas = [p for name, p in converted.named_parameters() if name.rpartition(".")[2] == "raw_alpha"]
        assert len(alphas) == len(plan.alphas)
        assert all(p.item() == start for p in alphas)
        report = normfree.verify(converted, original, x)
        expected = [True, True, True if init == "preserve" else None, True, True, True]
        assert [proof.passed for proof in report.proofs] == expected, f"{init}\n{report}"
        if init == "preserve":
            assert report.proofs[2].figure is not None
            assert report.proofs[2].figure <= 1e-9

    after = original.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before), "convert changed its input"
