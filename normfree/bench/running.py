"""One run: every arm takes its turn in every round, so that a machine whose speed drifts is the same for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from normfree.bench.arms import ARMS, Subject, build_arms, deployed
from normfree.bench.measures import Step, autocast, kernels, largest_batch, operators, peak_memory, saved_bytes, seconds
from normfree.bench.results import Result, Spread
from normfree.errors import UsageError

__all__ = ["Setting", "run"]

Models = Mapping[str, nn.Module]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """How to measure.

    Attributes:
        batch: Images a step.
        size: Height and width of an image in pixels.
        device: ``cpu`` or ``cuda``.
        dtype: ``fp32``, or what autocast computes in: ``bf16`` or ``fp16``.
        compiled: Whether every arm runs under ``torch.compile``.
        channels_last: Memory format of models and images.
        init: Starting point of the converted arms.
        runs: Rounds against the clock; with none, only what does not depend on it is counted.
        arms: Which arms, in this order.
        largest: Whether to look for the largest batch that fits, on a GPU and without ``torch.compile``.

    Raises:
        UsageError: There is no such device, dtype or starting point here, or the batch is too small.
    """

    batch: int = 16
    size: int = 224
    device: str = "cpu"
    dtype: str = "fp32"
    compiled: bool = False
    channels_last: bool = False
    init: Literal["skipinit", "preserve"] = "skipinit"
    runs: int = 10
    arms: tuple[str, ...] = tuple(ARMS)
    largest: bool = True

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise UsageError(f"device is {self.device!r}; it must be cpu or cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("device is 'cuda', and torch sees none here")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        if self.init not in ("skipinit", "preserve"):
            raise UsageError(f"init is {self.init!r}; it must be skipinit or preserve")
        if self.batch < 1 or self.runs < 0:
            raise UsageError("a benchmark needs a batch of at least 1, and no fewer than 0 runs")

    def about(self, source: str) -> dict[str, Any]:
        """Return what the rows of a run have in common."""
        names = ("init", "batch", "size", "device", "dtype", "compiled", "channels_last", "runs")
        device = torch.cuda.get_device_name() if self.device == "cuda" else "cpu"
        common = {name: getattr(self, name) for name in names} | {"device": device}
        versions = f"torch {torch.__version__.partition('+')[0]}"
        return {"model": source, **common, "threads": torch.get_num_threads(), "versions": versions}


def run(
    source: str, model: nn.Module, setting: Setting, step: Callable[[str], None] = lambda _: None
) -> tuple[Result, ...]:
    """Measure every arm of a model on white noise of three channels.

    Args:
        source: Its name, ``torchvision:resnet50``.
        model: The model with its norms; it is not changed.
        setting: How to measure.
        step: Told what comes next, for a progress bar: twice an arm, and once a round.

    Raises:
        UsageError: No arm exists for this model, or batch norm refuses one image.
    """
    arms = build_arms(Subject(source, model, setting.init), setting.arms)
    if not arms:
        raise UsageError(f"none of {', '.join(setting.arms)} exists for {source}")
    device = torch.device(setting.device)
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format
    shape = (setting.batch, 3, setting.size, setting.size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = images.to(device).contiguous(memory_format=layout)
    for arm in arms.values():
        cast(Any, arm).to(memory_format=layout)
    trained = {name: _compiled(arm, setting) for name, arm in arms.items()}
    counted: list[Result] = []
    with torch._dynamo.config.patch(recompile_limit=8 * len(arms)):  # all arms share the cache of one forward
        for name, arm in arms.items():
            step(f"counting {name}")
            arm.to(device)
            counted.append(_count(name, arm, trained[name], x, setting))
            arm.cpu()
        try:
            times = _times(arms, trained, x, setting, step) if setting.runs else {}
        except ValueError as error:
            if setting.batch > 1:
                raise
            raise UsageError(
                f"batch norm refuses a batch of one here ({error}): larger images, or without bn"
            ) from error
    return tuple(_timed(result, times) if times else result for result in counted)


def _step(model: nn.Module, setting: Setting) -> Step:
    # A rate of zero: hundreds of steps on noise must not end in infinities, which some machines compute more slowly.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    return Step(model, optimizer, DTYPES[setting.dtype])


def _compiled(model: nn.Module, setting: Setting) -> nn.Module:
    return cast(nn.Module, torch.compile(model)) if setting.compiled else model


def _count(name: str, arm: nn.Module, trained: nn.Module, x: Tensor, setting: Setting) -> Result:
    """Return what does not depend on the clock."""
    two = torch.cat([x, x])[:2]  # batch norm may refuse one image
    per_image, constant = saved_bytes(arm, two, DTYPES[setting.dtype])
    parameters = sum(p.nbytes for p in arm.parameters())
    result = Result(name, parameters, per_image, constant, *operators(_step(arm, setting), two))
    if x.device.type != "cuda":
        return result
    step = _step(trained, setting)
    result = replace(result, peak_bytes=peak_memory(step, x), kernels=kernels(step, x))
    if not setting.largest or setting.compiled:  # every size would compile anew
        return result
    return replace(result, largest_batch=largest_batch(step, x))


def _times(
    arms: Models, trained: Models, x: Tensor, setting: Setting, say: Callable[[str], None]
) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of every round by arm and by what was timed: ``step``, ``forward``, ``fused``."""
    work: dict[str, dict[str, Callable[[], object]]] = {}
    for name, arm in arms.items():
        say(f"preparing {name}")
        arm.to(x.device)
        work[name] = _works(arm, trained[name], x, setting)
        for call in work[name].values():  # compiles, allocates, chooses kernels: not on the clock
            call()
    times: dict[str, dict[str, list[float]]] = {name: {what: [] for what in calls} for name, calls in work.items()}
    names = list(work)
    for number in range(setting.runs):
        say(f"round {number + 1} of {setting.runs}")
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:  # nobody always comes after the same neighbour's mess
            for what, call in work[name].items():
                times[name][what].append(seconds(call, x.device))
    return times


def _works(arm: nn.Module, trained: nn.Module, x: Tensor, setting: Setting) -> dict[str, Callable[[], object]]:
    dtype = DTYPES[setting.dtype]
    fused, step = _compiled(deployed(arm), setting), _step(trained, setting)

    def infer() -> None:
        with torch.inference_mode(), autocast(x.device, dtype):
            fused(x)

    return {"step": lambda: step(x), "forward": lambda: step.loss(x), "fused": infer}


def _timed(result: Result, times: Mapping[str, Mapping[str, list[float]]]) -> Result:
    """Add what the clock says."""
    own = times[result.arm]
    ratios = {
        other: Spread.of([a / b for a, b in zip(own["step"], series["step"], strict=True)])
        for other, series in times.items()
        if other != result.arm
    }
    spreads: dict[str, Any] = {f"{what}_ms": Spread.of([1e3 * t for t in series]) for what, series in own.items()}
    return replace(result, step_to=ratios, **spreads)
