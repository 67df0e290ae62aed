"""What only a GPU can show: CUDA graphs, scaled gradients of float16, kernels, memory. Skipped where there is none."""

from __future__ import annotations

import csv
import functools
from pathlib import Path

import pytest
import steps
import torch
from harness import noise, randomise
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50

import normfree
from normfree.bench import Setting, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
INITS = ("skipinit", "preserve")


def converted(init: str) -> nn.Module:
    torch.manual_seed(0)
    model = randomise(resnet18(num_classes=5))
    return normfree.convert(model, init=init, alpha=0.5).cuda().train()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], bound: float) -> bool:
    assert ours.keys() == theirs.keys()
    return all((ours[key] - theirs[key]).norm() <= bound * (1e-6 + theirs[key].norm()) for key in theirs)


@pytest.mark.parametrize("init", INITS)
def test_a_captured_training_step_is_the_eager_one(init: str) -> None:
    model = converted(init)
    first, second = noise(4, 3, 64, 64).cuda(), 2 * noise(4, 3, 64, 64).flip(0).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    x = first.clone()

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        model(x).square().mean().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    x.copy_(second)
    with torch.no_grad():  # the weight is combined inside the graph: a replay sees what was trained since
        model.layer1[0].conv2.alpha.add_(0.25)
        model.conv1.weight.mul_(1.1)
    graph.replay()
    replayed = gradients(model)
    step()
    assert close(replayed, gradients(model), 1e-3)  # convolutions in tf32 add up in any order


@pytest.mark.parametrize("norms", [False, True])
def test_the_examples_record_what_they_would_do(norms: bool) -> None:
    model = resnet18(num_classes=5).cuda().train() if norms else converted("skipinit")
    y = torch.arange(4, device="cuda")
    buffers = [buffer.clone() for buffer in model.buffers()]
    replay = steps.recorded(model, noise(4, 3, 64, 64).cuda(), y)
    assert all(map(torch.equal, model.buffers(), buffers)), "the recording moved running statistics"
    x = 2 * noise(4, 3, 64, 64).flip(0).cuda()
    loss, ours = replay(x, y).item(), gradients(model)
    moved = [buffer.clone() for buffer in model.buffers()]
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before)
    assert loss == pytest.approx(steps.gradients(model, x, y).item(), rel=1e-4)
    assert close(ours, gradients(model), 1e-3)
    assert all(map(torch.allclose, model.buffers(), moved))


@pytest.mark.filterwarnings("ignore")  # inductor's own, which it turns into errors of the compilation
@pytest.mark.parametrize("init", INITS)
def test_compiled_with_cuda_graphs(init: str) -> None:
    model, x = converted(init), noise(4, 3, 64, 64).cuda()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # the first calls compile and capture
        model.zero_grad()
        compiled(x).square().mean().backward()
    ours = gradients(model)
    model.zero_grad()
    model(x).square().mean().backward()
    assert close(ours, gradients(model), 1e-2)


@pytest.mark.parametrize("init", INITS)
def test_float16_with_scaled_gradients_trains(init: str) -> None:
    model, x = converted(init).to(memory_format=torch.channels_last), noise(8, 3, 64, 64).cuda()
    y = torch.arange(8, device="cuda") % 5
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cuda")
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert scaler.get_scale() >= 2.0**10, "few steps were skipped"
    assert all(p.dtype is torch.float32 and p.grad is not None for p in model.parameters())


def test_bench_counts_kernels_and_memory() -> None:
    arms = ("bn", "normfree", "biases", "bare")
    setting = Setting(batch=32, size=64, device="cuda", runs=2, arms=arms, largest=False)
    bn, ours, biases, bare = run("torchvision:resnet18", resnet18(), setting)
    assert bn.kernels is not None
    assert ours.kernels is not None
    assert biases.kernels is not None
    assert bare.kernels is not None
    assert bare.kernels < biases.kernels < ours.kernels
    assert bare.kernels < bn.kernels
    assert None not in (bn.peak_bytes, ours.peak_bytes)
    assert ours.peak_bytes < bn.peak_bytes  # type: ignore[operator]


def test_largest_batch_is_looked_for_only_if_asked() -> None:
    search = functools.partial(Setting, batch=2, size=64, device="cuda", runs=0, arms=("normfree",))
    (found,) = run("torchvision:resnet18", resnet18(), search())
    (plain,) = run("torchvision:resnet18", resnet18(), search(largest=False))
    assert plain.largest_batch is None
    assert found.largest_batch is not None
    assert found.largest_batch >= 256


def test_kernels_are_no_more_than_the_table_says() -> None:
    path = Path(steps.__file__).parents[1] / "results" / "training_gpu.csv"
    with path.open(newline="") as file:
        known = [row for row in csv.DictReader(file) if (row["batch"], row["compiled"]) == ("256", "False")]
    table = {row["arm"]: int(row["kernels"]) for row in known if row["model"] == "torchvision:resnet50"}
    arms = ("normfree", "bare")
    setting = Setting(256, device="cuda", dtype="bf16", channels_last=True, runs=0, arms=arms, largest=False)
    ours, bare = run("torchvision:resnet50", resnet50(), setting)
    assert ours.kernels is not None
    assert bare.kernels is not None
    assert ours.kernels - bare.kernels <= table["normfree"] - table["bare"]
