"""Broken and hostile files: refused with a message, in little memory, and nothing of them is run or left."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hostile import MUTATIONS, Victim, feed
from marks import broad

RUNS = [6, *broad(223)]
"""Files of each kind, two thousand in all at most; `python tests/shared/hostile.py 5000` feeds more."""


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Victim:
    return Victim(tmp_path_factory.mktemp("victim"))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch warns of what it reads there
@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("kind", range(len(MUTATIONS)), ids=[mutation.__name__ for mutation in MUTATIONS])
def test_files_of_every_kind(victim: Victim, kind: int, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(victim.folder)
    codes: Counter[int] = Counter()
    for number in range(kind, runs * len(MUTATIONS), len(MUTATIONS)):
        name, code, said = feed(victim, number, seed=0)
        assert name == MUTATIONS[kind].__name__
        assert "Traceback" not in said
        codes[code] += 1
    assert codes[1] + codes[2] >= runs // 4, "most of them are refused"


def test_the_trap_works(victim: Victim, tmp_path: Path) -> None:
    """The one that no file may spring."""
    import pickle

    from hostile import Trap

    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))  # noqa: S301  # our own
    assert (tmp_path / "sprung").exists()
    assert not victim.trap.exists()
