"""On random networks with several paths, what no run came to is preserved too, and so is what every hook sees.

``-m broad`` takes five thousand, each drawn from its own seed; a failure prints the text of the network.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from types import MethodType

import pytest
import torch
from harness import assert_close, noise
from hypothesis import Phase, currently_in_test_context, given, note, settings
from hypothesis import strategies as st
from random_paths import PATHS, Block, Hook, Link, Paths, drawn, seen_by
from random_texts import ACTS, ADDITIONS, AROUND, HOOKS, LINKS, is_norm
from test_random_networks import leaves
from torch import Tensor, nn

import normfree
from normfree.deployment.fuse import FuseWarning
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


WRONG_ONCE = (52, 707, 2677, 4778)
"""A layer whose name only begins as it is written, ``getattr(net, f"c{i}")``; a network that is dead; two layers that
come behind what may go forward into them, but are called without the norm behind them."""


@pytest.mark.parametrize("seed", WRONG_ONCE)
def test_every_path_of_a_network_that_was_wrong_is_preserved(seed: int) -> None:
    assert not failure(seed), failure(seed)


@pytest.mark.broad
@pytest.mark.parametrize("first", range(0, 5000, 100))
def test_every_path_of_a_hundred_networks_is_preserved(first: int) -> None:
    failed = {seed: error for seed in range(first, first + 100) if (error := failure(seed))}
    assert not failed, failed


def failure(seed: int) -> str:
    """Return the text of the network of a seed with what is wrong with it, or nothing."""
    network = drawn(seed)
    try:
        hold(network)
    except Exception as error:
        return f"{network.source()}\n{network}\n{type(error).__name__}: {error}"
    return ""


def tell(path: str) -> None:
    """Note a path, so that a failure says on which it was."""
    if currently_in_test_context():
        note(path)


def hold(network: Paths) -> None:
    """Hold each path of a network, and what each hook sees on it, to the original."""
    x = noise(2, 4, 5, 5, dtype=torch.float64)
    model = network.build()
    if walk(copy.deepcopy(model), "as it is", x) is None or refused(model, x):
        return
    converted = normfree.convert(model, init="preserve", inputs=x, check=False)
    hold_paths(converted, model, x)
    if not network.hooks:  # what hooks see of a slot goes with it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FuseWarning)
            hold_paths(normfree.fuse(converted), model, x, ["as it is"])
    hold_skipinit(model, x)


def hold_paths(converted: nn.Module, model: nn.Module, x: Tensor, paths: Iterable[str] = PATHS) -> None:
    """Hold each path of a network that was made of a model, and what each hook sees on it."""
    for path in paths:
        expected = walk(copy.deepcopy(model), path, x)
        if expected is None:
            continue  # the original has no such path
        try:
            found = walk(copy.deepcopy(converted), path, x)
        except UsageError:  # a block that was rewritten says that it does not know this path
            continue
        assert found is not None, f"{path}: fails"
        assert len(found) == len(expected), f"{path}: hooks see another number of values"
        tell(path)
        for mine, theirs in zip(found, expected, strict=True):
            assert_close(mine, theirs)


def refused(model: nn.Module, x: Tensor) -> bool:
    """Whether a network holds a method of a norm, with which nothing can be done but to say so."""
    held = [value for m in model.modules() for value in vars(m).values() if isinstance(value, MethodType)]
    if held:
        with pytest.raises(UnsupportedModelError, match="method"):
            normfree.convert(model, init="preserve", inputs=x)
    return bool(held)


def hold_skipinit(model: nn.Module, x: Tensor) -> None:
    """No norm is left, and on no path does anything depend on the rest of the batch, whatever the scalars are."""
    converted = normfree.convert(model, init="skipinit", inputs=x)
    assert not any(map(is_norm, converted.modules()))
    for name, parameter in converted.named_parameters():
        if name.endswith("alpha"):  # at zero nothing would come out of a branch
            nn.init.constant_(parameter, 0.7)
    for path in PATHS:
        try:
            fresh = copy.deepcopy(converted)
            together, alone = walk(fresh, path, x), walk(fresh, path, x[:1])
        except UsageError:
            continue
        tell(path)
        assert (together is None) == (alone is None), f"skipinit, {path}: fails for some batches"
        for all_samples, one in zip(together or (), alone or (), strict=True):
            torch.testing.assert_close(all_samples[:1], one[:1])


def walk(model: nn.Module, path: str, x: Tensor) -> list[Tensor] | None:
    """Return what comes out on a path that a network goes for good, and what hooks saw; ``None`` where it fails."""
    seen = seen_by(model)
    seen.clear()
    try:
        with torch.no_grad():
            return [*leaves(PATHS[path](model, x.clone())), *seen]
    except (AttributeError, IndexError, RuntimeError, TypeError):
        return None
