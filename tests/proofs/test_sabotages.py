"""Every sabotage in the table is seen by a proof, and what is no sabotage is not taken for one."""

from __future__ import annotations

import copy
import functools
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import both, noise
from sabotages import BOTH, TABLE, Net, converted

import normfree
from normfree.proofs import PROOFS, Case
from normfree.tracing.copying import deep_copy

X = noise(3, 3, 6, 6)
SURVIVORS: dict[str, str] = {}
"""What no proof sees, each with the reason."""


@functools.cache
def pair(init: str) -> tuple[Net, Net]:
    return converted(init)


def fails(case: Case, proof: Any) -> bool:
    try:
        return proof(case).passed is False
    except Exception:  # which ``verify`` reports as a proof that failed
        return True


@pytest.mark.parametrize(("init", "name"), [(init, name) for name, (inits, _) in TABLE.items() for init in inits])
def test_sabotage_is_seen(init: str, name: str) -> None:
    original, good = pair(init)
    bad = deep_copy(good)
    TABLE[name][1](bad)
    case = Case(bad, original, original, None, normfree.Plan.of(good), (X,), {})
    seen = any(fails(case, proof) for proof in reversed(PROOFS.values()))  # the cheapest last one sees most
    assert seen is (name not in SURVIVORS)


def test_the_table_is_long() -> None:
    assert all(sum(init in inits for inits, _ in TABLE.values()) >= 60 for init in BOTH)
    assert len(SURVIVORS) <= 3


BROKEN = ["alpha_gone", "alpha_a_buffer", "key_renamed", "weight_in_float64", "forward_that_raises_in_train_mode"]


@both
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_reported_and_not_raised(init: str, name: str) -> None:
    original, good = pair(init)
    bad = deep_copy(good)
    TABLE[name][1](bad)
    report = normfree.verify(bad, original, X)
    assert len(report.proofs) == 6
    assert not report.ok


WITHOUT = ["roll_inside_a_branch", "mean_of_the_batch_taken_off_in_train_mode", "batch_norm_back_in_its_slot"]
WITHOUT += ["branch_writes_into_the_skip_path", "alpha_gone", "alpha_behind_the_sum", "calls_remembered"]
WITHOUT += ["statistics_in_a_slot", "standardised_by_hand_in_train_mode", "neighbour_leaks_a_little"]


@both
@pytest.mark.parametrize("name", WITHOUT)
def test_sabotage_is_seen_without_the_original(init: str, name: str) -> None:
    bad = deep_copy(pair(init)[1])
    TABLE[name][1](bad)
    assert not normfree.verify(bad, None, X).ok


def trained(model: Any) -> Any:
    optimizer = torch.optim.SGD(normfree.param_groups(model, lr=1e-2))
    for _ in range(3):
        optimizer.zero_grad()
        sum(F.cross_entropy(out, torch.tensor([0, 1, 2])) for out in model(X)).backward()
        optimizer.step()
    return model


def looked_on(model: Any) -> Any:
    model.pre.register_forward_hook(lambda *_: None)
    model.pre.register_full_backward_hook(lambda *_: None)
    return model


def pickled(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


FINE = {
    "a deep copy": copy.deepcopy,
    "pickled": pickled,
    "run in train mode": lambda model: (model.train()(X), model)[1],
    "in float64": lambda model: model.double(),
    "channels last": lambda model: model.to(memory_format=torch.channels_last),
    "somebody looks on": looked_on,
}


@both
@pytest.mark.parametrize("how", FINE)
def test_what_is_no_sabotage_is_not_blamed(init: str, how: str) -> None:
    original, good = pair(init)
    report = normfree.verify(FINE[how](deep_copy(good)), original, X)
    assert report.ok, f"\n{report}"


def test_training_is_no_sabotage() -> None:
    original, good = pair("skipinit")
    model = trained(deep_copy(good).train())
    report = normfree.verify(model, original, X)
    assert report.ok, f"\n{report}"
