"""On random networks with several paths, what no run came to is preserved too, and so is what every hook sees.

``-m broad`` takes five thousand; a failure prints the text of the smallest network that fails.
"""

from __future__ import annotations

import copy
from types import MethodType

import pytest
import torch
from harness import assert_close, noise
from hypothesis import Phase, given, note, settings
from hypothesis import strategies as st
from random_paths import PATHS, Block, Hook, Link, Paths, seen_by
from random_texts import ACTS, ADDITIONS, AROUND, HOOKS, LINKS, is_norm
from test_random_networks import leaves
from torch import Tensor, nn

import normfree
from normfree.errors import UnsupportedModelError, UsageError


def links() -> st.SearchStrategy[Link]:
    usual = st.just("plain")
    return st.builds(
        Link,
        how=st.one_of(usual, *[st.sampled_from(list(LINKS))] * 3),
        kernel=st.sampled_from([3, 1]),
        bias=st.booleans(),
        mode=st.integers(1, 2),
        back=st.integers(0, 2),
        act=st.sampled_from(ACTS),
    )


def blocks() -> st.SearchStrategy[Block]:
    return st.builds(
        Block,
        links=st.lists(links(), min_size=1, max_size=3).map(tuple),
        addition=st.sampled_from(list(ADDITIONS)),
        around=st.one_of(st.just("plain"), st.sampled_from(list(AROUND))),
    )


def networks() -> st.SearchStrategy[Paths]:
    hooks = st.builds(Hook, st.sampled_from(list(HOOKS)), st.integers(0, 15))
    return st.builds(
        Paths,
        blocks=st.lists(blocks(), min_size=1, max_size=2).map(tuple),
        hooks=st.one_of(st.just(()), st.lists(hooks, max_size=2).map(tuple)),
        seed=st.integers(0, 3),
    )


@settings(max_examples=40, phases=[Phase.generate])
@given(network=networks())
def test_every_path_of_a_random_network_is_preserved(network: Paths) -> None:
    note(network.source())
    hold(network)


@pytest.mark.broad
@settings(max_examples=5000)
@given(network=networks())
def test_every_path_of_five_thousand_random_networks_is_preserved(network: Paths) -> None:
    note(network.source())
    hold(network)


def hold(network: Paths) -> None:
    """Hold each path of a network, and what each hook sees on it, to the original."""
    x = noise(2, 4, 5, 5, dtype=torch.float64)
    model = network.build()
    if walk(model, "as it is", x) is None or refused(model, x):
        return
    converted = normfree.convert(model, init="preserve", inputs=x, check=False)
    for path in PATHS:
        expected = walk(model, path, x)
        if expected is None:
            continue  # the original has no such path
        try:
            found = walk(converted, path, x)
        except UsageError:  # a block that was rewritten says that it does not know this path
            continue
        assert found is not None, f"{path}: fails"
        assert len(found) == len(expected), f"{path}: hooks see another number of values"
        note(path)
        for mine, theirs in zip(found, expected, strict=True):
            assert_close(mine, theirs)
    if network.seed == 0:
        hold_skipinit(model, x)


def refused(model: nn.Module, x: Tensor) -> bool:
    """Whether a network holds a method of a norm, with which nothing can be done but to say so."""
    held = [value for m in model.modules() for value in vars(m).values() if isinstance(value, MethodType)]
    if held:
        with pytest.raises(UnsupportedModelError, match="method"):
            normfree.convert(model, init="preserve", inputs=x)
    return bool(held)


def hold_skipinit(model: nn.Module, x: Tensor) -> None:
    """No norm is left, nothing depends on the rest of the batch, and blocks that carry an alpha start at zero."""
    converted = normfree.convert(model, init="skipinit", inputs=x)
    assert not any(map(is_norm, converted.modules()))
    with torch.no_grad():
        together, alone = (leaves(converted(part)) for part in (x, x[:1]))
    for all_samples, one in zip(together, alone, strict=True):
        torch.testing.assert_close(all_samples[:1], one)


def walk(model: nn.Module, path: str, x: Tensor) -> list[Tensor] | None:
    """Return what comes out on a path, and what hooks saw; ``None`` where the network itself fails."""
    fresh, seen = copy.deepcopy(model), seen_by(model)
    seen.clear()
    try:
        with torch.no_grad():
            return [*leaves(PATHS[path](fresh, x.clone())), *seen]
    except (AttributeError, IndexError, RuntimeError, TypeError):
        return None
