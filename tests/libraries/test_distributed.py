"""Two processes train as one does: DDP and FSDP2 on the CPU, in float64; they meet through a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import workers
from harness import assert_close, both

RANKS = range(workers.WORLD)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train once in every way: starting processes takes most of the time."""
    folder = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(workers.run, (folder,), nprocs=workers.WORLD)
    return folder


@both
@pytest.mark.parametrize("how", ["data_parallel", "sharded"])
def test_training_together_is_training_on_the_whole_batch(folder: Path, how: str, init: str) -> None:
    model = workers.build(init)
    expected = workers.train(model, workers.batches())
    trained = model.state_dict()
    for rank in RANKS:
        gradients, state, _ = torch.load(folder / f"{how}-{init}-{rank}")
        assert gradients.keys() == expected.keys()
        assert state.keys() == trained.keys()
        for name, gradient in expected.items():
            assert_close(gradients[name], gradient, 1e-6)
        for name, tensor in trained.items():
            assert_close(state[name], tensor, 1e-6)


@both
def test_no_buffer_is_broadcast(folder: Path, init: str) -> None:
    assert [torch.load(folder / f"data_parallel-{init}-{rank}")[2] for rank in RANKS] == [[], []]


@both
def test_alpha_is_a_shard_of_one_process_and_biases_are_split_unevenly(folder: Path, init: str) -> None:
    shards = [torch.load(folder / f"sharded-{init}-{rank}")[2] for rank in RANKS]
    shapes = {name: [shard[name] for shard in shards] for name in shards[0]}
    assert [found for name, found in shapes.items() if name.endswith("alpha")] == [[(1,), (0,)]] * 2
    vectors = [found for name, found in shapes.items() if name.endswith(("gain", "bias"))]
    assert vectors == [[(3,), (2,)]] * len(vectors)
    assert len(vectors) >= (5 if init == "skipinit" else 7)
