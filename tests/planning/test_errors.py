"""What is refused, by which error, and whether its text says where and what to do."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from harness import assert_preserved, both, noise, prove, randomise
from readings import actions, norms
from torch import Tensor, nn

import normfree
from normfree.errors import (
    AlreadyConvertedError,
    NoNormError,
    NormfreeError,
    UnsupportedModelError,
    UsageError,
    WrappedModelError,
)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


@both
def test_model_without_norm_is_refused(init: str) -> None:
    with pytest.raises(NoNormError, match="this Sequential holds no batch normalisation"):
        normfree.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), init=init)


@both
def test_second_conversion_is_refused(init: str) -> None:
    converted = normfree.convert(net(), init=init)
    with pytest.raises(AlreadyConvertedError, match=r"has been converted already.*Convert the original"):
        normfree.convert(converted, init=init)
    with pytest.raises(AlreadyConvertedError, match="converted already"):
        normfree.convert(nn.Sequential(*net(), normfree.SkipInit()), init=init)


def test_part_converted_inside_another_model_is_named() -> None:
    outer = nn.Sequential(normfree.convert(net(), init="preserve"), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(AlreadyConvertedError, match=r"for example '0\.0'.*norms left or added since: 2"):
        normfree.convert(outer)


def test_wrapped_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(WrappedModelError, match=r"DataParallel.*model\.module"):
        normfree.convert(nn.DataParallel(net()))
    with pytest.raises(WrappedModelError, match=r"OptimizedModule.*model\._orig_mod"):
        normfree.convert(torch.compile(net(), backend="eager"))
    compiled = net()
    compiled.compile(backend="eager")
    with pytest.raises(WrappedModelError, match="convert it before compiling"):
        normfree.convert(compiled)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(WrappedModelError, match=r"DistributedDataParallel.*model\.module"):
            normfree.convert(nn.parallel.DistributedDataParallel(net()))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*torch.jit.*:FutureWarning")
def test_scripted_model_is_refused_and_a_scripted_norm_is_named() -> None:
    with pytest.raises(WrappedModelError, match="the Python module it was scripted from"):
        normfree.convert(torch.jit.script(net()))
    inner = nn.Sequential(net(), torch.jit.script(nn.BatchNorm2d(4)))
    with pytest.raises(UnsupportedModelError, match=r"1 \(RecursiveScriptModule\): .*before scripting"):
        normfree.convert(inner)


class OwnForward(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3


class NoForward(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3), NoForward(3), OwnForward(3)], ids=lambda m: type(m).__name__)
def test_root_that_is_a_norm_is_refused(norm: nn.Module) -> None:
    with pytest.raises(UsageError, match=rf"the model itself is a {type(norm).__name__}.*nn\.Sequential\(norm\)"):
        normfree.convert(norm)


def test_root_that_is_no_module_is_refused() -> None:
    with pytest.raises(UsageError, match=r"expected a torch\.nn\.Module, got dict"):
        normfree.convert({"model": net()})
    with pytest.raises(UsageError, match=r"got the class BatchNorm2d: call it"):
        normfree.convert(nn.BatchNorm2d)  # type: ignore[arg-type]


@both
def test_lazy_norm_is_refused_until_it_has_run(init: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d())
    with pytest.raises(UnsupportedModelError, match=r"1 \(LazyBatchNorm2d\).*run one forward pass"):
        normfree.convert(model, init=init)
    model(noise(2, 3, 6, 6))
    assert actions(prove(randomise(model), noise(2, 3, 6, 6), init=init)) == {"1": "fold"}


@both
def test_lazy_convolution_is_refused_until_it_has_run(init: str) -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4))
    with pytest.raises(UnsupportedModelError, match=r"0 \(LazyConv2d\).*run one forward pass"):
        normfree.convert(model, init=init)


@both
def test_unknown_subclass_is_refused_until_it_is_registered(init: str) -> None:
    class Tripled(OwnForward):
        pass

    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), Tripled(4)))
    with pytest.raises(UnsupportedModelError, match=r"1 \(.*Tripled\).*normfree\.register_norm"):
        normfree.convert(model, init=init)

    @normfree.register_norm(Tripled)
    def describe(norm: Any) -> normfree.Norm:
        mean, var = norm.running_mean, norm.running_var
        return normfree.Norm(norm.num_features, mean, var, norm.weight * 3, norm.bias * 3, norm.eps)

    assert actions(prove(model, noise(2, 3, 6, 6), init=init)) == {"1": "fold"}
    assert_preserved(model, noise(2, 3, 6, 6))
    with pytest.raises(ValueError, match="registered already"):
        normfree.register_norm(Tripled)(describe)


@both
def test_subclass_without_a_forward_of_its_own_is_ordinary(init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), NoForward(4)))
    assert actions(prove(model, noise(2, 3, 6, 6), init=init)) == {"1": "fold"}


class Homemade(nn.Module):
    """A batch norm that shares nothing with torch's but the name of its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.running_mean[:, None, None]


@both
def test_every_problem_is_listed_at_once(init: str) -> None:
    patched = nn.BatchNorm2d(4)
    patched.forward = lambda x: x * 2
    layers = [nn.Conv2d(3, 4, 3), OwnForward(4), nn.BatchNorm2d(4), Homemade(), nn.LazyBatchNorm2d(), patched]
    with pytest.raises(UnsupportedModelError, match="4 problem") as error:
        normfree.convert(nn.Sequential(*layers), init=init)
    assert [problem.split(" ")[0] for problem in error.value.problems] == ["1", "3", "4", "5"]


def test_norm_without_statistics_cannot_be_preserved_but_deleted() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU())
    with pytest.raises(UnsupportedModelError, match=r"1 \(BatchNorm2d\): .*no running statistics.*init='skipinit'"):
        normfree.convert(model, init="preserve")
    assert norms(prove(model, noise(2, 3, 6, 6), init="skipinit")) == []
    assert normfree.plan(model).init == "skipinit"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"init": "fixup"}, "init is 'fixup'; it must be"),
        ({"init": None}, "init is None; it must be"),
        ({"alpha": "sqrt"}, "alpha is 'sqrt'; it must be a finite number or 'rsqrt_depth'"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"alpha": True}, "alpha is True"),
        ({"alpha": [0.1]}, "alpha is \\[0.1\\]"),
        ({"scope": "stem"}, "scope is 'stem'; it must be 'all' or 'residual'"),
        ({"include": "layer9.*"}, "no norm and no sum matches 'layer9.\\*'; norms: 1"),
        ({"exclude": ["1", "bn?"]}, "no norm and no sum matches 'bn\\?'"),
        ({"exclude": "1"}, "leave none of 1 norms to convert: 1"),
        ({"scope": "residual"}, "leave none of 1 norms"),
    ],
)
def test_bad_argument_is_refused_with_what_it_should_be(options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        normfree.convert(net(), **options)


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "parameters": {name: (id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)},
        "modules": [(name, id(m), type(m), m.training) for name, m in model.named_modules(remove_duplicate=False)],
        "attributes": {name: sorted(m.__dict__) for name, m in model.named_modules()},
        "inplace": [m.inplace for m in model.modules() if hasattr(m, "inplace")],
    }


@both
def test_failed_conversion_in_place_leaves_the_model_as_it_was(init: str) -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AvgPool2d(2), nn.BatchNorm2d(4), nn.ReLU(inplace=True)]
    model = randomise(nn.Sequential(*layers, nn.Conv2d(4, 4, 1), OwnForward(4))).train()
    model[1].eval()
    model[5].weight.requires_grad_(False)
    before = snapshot(model)
    for options in ({}, {"exclude": "nothing"}, {"alpha": "x"}, {"include": ["6"], "exclude": ["6"]}):
        with pytest.raises(NormfreeError):
            normfree.convert_(model, init=init, **options)
        after = snapshot(model)
        assert all(torch.equal(after["state"][k], v) for k, v in before["state"].items())
        for key in ("parameters", "modules", "attributes", "inplace"):
            assert after[key] == before[key]


class Sealed(nn.Module):
    """A class that may not be subclassed, as registries that hook into subclassing make them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        raise TypeError(f"{cls.__name__} may not be derived")

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x).cumsum(1)


class EndsSealed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.end = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), Sealed()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.end(self.bn(self.conv(x)))


@both
def test_tail_that_cannot_be_changed_is_all_or_nothing(init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), EndsSealed()))
    before = snapshot(model)["modules"]
    with contextlib.suppress(NormfreeError, TypeError):
        normfree.convert_(model, init=init)
    assert snapshot(model)["modules"] == before or norms(model) == []


def test_sharded_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        with pytest.raises(WrappedModelError, match="sharded by fully_shard: convert the model before sharding"):
            normfree.convert(fully_shard(net(), mesh=mesh))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*FullyShardedDataParallel.*", "ignore:.*FSDP.*")
def test_model_or_part_inside_fsdp1_is_refused_with_the_way_out(tmp_path: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
        with pytest.raises(WrappedModelError, match=r"FullyShardedDataParallel.*model\.module"):
            normfree.convert(wrapped)
        with pytest.raises(WrappedModelError, match=r"^1 is wrapped in FullyShardedDataParallel: convert .* before"):
            normfree.convert(nn.Sequential(nn.ReLU(), wrapped))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("born", [False, True], ids=["model from outside", "model from inside"])
@pytest.mark.parametrize("made", ["convert", "convert_", "fuse", "restore", "calibrate"])
def test_what_is_made_in_inference_mode_trains_outside(made: str, born: bool) -> None:
    x = noise(2, 3, 32, 32)
    with torch.inference_mode(born):
        model = timm.create_model("test_resnet", num_classes=2)
    with torch.inference_mode():
        if born and made == "convert_":  # its own weights do not train either
            assert normfree.convert_(model, init="preserve")(x).isfinite().all()
            return
        found = (normfree.convert_ if made == "convert_" else normfree.convert)(model, init="preserve")
        if made in ("fuse", "restore"):
            found = getattr(normfree, made)(found)
        if made == "calibrate":
            found = normfree.calibrate(found, x)
    found.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in found.parameters())
