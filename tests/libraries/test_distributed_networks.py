"""resnet50 and efficientnet_b0 train on two and four processes as on one: nothing is broadcast or synchronised."""

from __future__ import annotations

from pathlib import Path

import networks_worker
import pytest
import torch
from torch import nn


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train once in every way: starting processes takes most of the time."""
    folder = tmp_path_factory.mktemp("networks")
    torch.multiprocessing.spawn(networks_worker.run, (folder,), nprocs=networks_worker.WORLD)
    return folder


@pytest.mark.broad
@pytest.mark.parametrize(("world", "name"), [(2, "resnet50"), (4, "efficientnet_b0")])
def test_data_parallel_gradients_are_those_of_the_whole_batch(folder: Path, world: int, name: str) -> None:
    for rank in range(world):
        error, buffers = torch.load(folder / str(rank))[name]
        assert error <= 1e-6
        assert buffers == 0


def test_there_is_nothing_to_synchronise() -> None:
    model = networks_worker.build("test_efficientnet")
    before = [type(module) for module in model.modules()]
    assert nn.SyncBatchNorm.convert_sync_batchnorm(model) is model
    assert [type(module) for module in model.modules()] == before


@pytest.mark.broad
def test_sharded_training_saves_and_loads_a_full_state(folder: Path) -> None:
    for rank in range(networks_worker.WORLD):
        before, after = torch.load(folder / str(rank))["sharded"]
        assert before <= 1e-6
        assert after <= 1e-6
    model, state = networks_worker.build("efficientnet_b0"), torch.load(folder / "full.pt")
    networks_worker.step(model, *networks_worker.batch())
    trained = model.state_dict()
    assert state.keys() == trained.keys()
    for name, tensor in trained.items():
        assert torch.allclose(state[name], tensor, rtol=1e-6, atol=1e-9), name  # a mean that is not known is zero
