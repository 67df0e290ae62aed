"""Two processes train as one does: DDP and FSDP2 on the CPU, in float64; they meet through a file."""

from __future__ import annotations

from pathlib import Path

import torch
import workers
from harness import assert_close, both
from torch import Tensor

PREFIX = "module."


def alone(init: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the gradients and the state after one process has trained on the whole batches."""
    model = workers.build(init)
    gradients = workers.train(model, workers.batches())
    return gradients, model.state_dict()


@both
def test_data_parallel_training_is_that_of_the_whole_batch(init: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(workers.data_parallel, (tmp_path, init), nprocs=workers.WORLD)
    gradients, state, buffers = torch.load(tmp_path / "result")
    assert buffers == 0  # none is broadcast
    expected, trained = alone(init)
    assert {name.removeprefix(PREFIX) for name in gradients} == expected.keys()
    for name, gradient in expected.items():
        assert_close(gradients[PREFIX + name], gradient, 1e-6)
    for name, tensor in trained.items():
        assert_close(state[name], tensor, 1e-6)


@both
def test_sharded_training_is_that_of_the_whole_batch(init: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(workers.sharded, (tmp_path, init), nprocs=workers.WORLD)
    expected, trained = alone(init)
    shapes = []
    for rank in range(workers.WORLD):
        gradients, state, local = torch.load(tmp_path / f"result{rank}")
        shapes.append(local)
        assert gradients.keys() == expected.keys()
        assert state.keys() == trained.keys()
        for name, gradient in expected.items():
            assert_close(gradients[name], gradient, 1e-6)
        for name, tensor in trained.items():
            assert_close(state[name], tensor, 1e-6)
    for name in (name for name in trained if name.endswith("alpha")):
        assert [local[name] for local in shapes] == [(1,), (0,)]  # one process holds it, and the other nothing
    for name in (name for name in trained if name.endswith("bias")):
        assert [local[name] for local in shapes] == [(3,), (2,)]
    assert sum(name.endswith("alpha") for name in trained) == 2
