"""A converted model is the same model: same class, same methods, same behaviour in the tools around it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torchvision
from harness import assert_close, noise, randomise
from timm.models.resnet import ResNet
from torch import Tensor, nn

import normfree

X = noise(2, 3, 64, 64)


@pytest.fixture(scope="module", params=["skipinit", "preserve"])
def model(request: pytest.FixtureRequest) -> ResNet:
    torch.manual_seed(0)
    original = timm.create_model("resnet50", layers=(1, 1, 1, 1))
    randomise(original)
    converted: ResNet = normfree.convert(original, init=request.param)
    with torch.no_grad():
        for name, parameter in converted.named_parameters():
            if name.endswith("alpha"):
                parameter.fill_(0.5)  # away from zero, so that every weight matters below
    return converted.eval()


def test_class_and_configuration(model: ResNet) -> None:
    assert type(model) is ResNet
    assert model.pretrained_cfg["architecture"] == "resnet50"
    assert model.num_classes == 1000
    assert model.feature_info[-1]["module"] == "layer4"


def test_forward_features_and_head(model: ResNet) -> None:
    features = model.forward_features(X)
    assert features.shape == (2, 2048, 2, 2)
    assert_close(model.forward_head(features), model(X), 1e-6)


def test_reset_classifier(model: ResNet) -> None:
    changed = copy.deepcopy(model)
    changed.reset_classifier(10)
    assert changed(X).shape == (2, 10)
    assert_close(changed.forward_features(X), model.forward_features(X), 1e-6)


def test_gradient_checkpointing(model: ResNet) -> None:
    plain, saving = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    saving.set_grad_checkpointing()
    plain(X).square().sum().backward()
    saving(X).square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert one.grad is not None, name
        assert torch.equal(one.grad, other.grad), name


def test_hooks_on_containers(model: ResNet) -> None:
    seen: list[torch.Size] = []
    handle = model.layer1.register_forward_hook(lambda _, __, out: seen.append(out.shape))
    model(X)
    handle.remove()
    assert seen == [torch.Size([2, 256, 16, 16])]


def test_forward_intermediates(model: ResNet) -> None:
    final, intermediates = model.forward_intermediates(X)
    assert [x.shape[1] for x in intermediates] == [64, 256, 512, 1024, 2048]
    assert_close(final, model.forward_features(X), 1e-6)


def _deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def _pickle(model: nn.Module) -> nn.Module:
    loaded: nn.Module = pickle.loads(pickle.dumps(model))  # noqa: S301  # written on the same line
    return loaded


def _torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


def _state_dict(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("copied", [_deepcopy, _pickle, _torch_save, _state_dict])
def test_copies_compute_the_same(model: ResNet, copied: Callable[[nn.Module], nn.Module]) -> None:
    other = copied(model)
    assert type(other) is type(model)
    assert torch.equal(other(X), model(X))
    own = {id(p) for p in model.parameters()}
    assert not own & {id(p) for p in other.parameters()}


def test_tails_that_scale_an_output_survive_pickle_and_deepcopy() -> None:
    original = timm.create_model("seresnet50", layers=(1, 1, 1, 1), num_classes=3)
    converted = normfree.convert(randomise(original), init="preserve", alpha=0.5).eval()
    tail = converted.layer1[0].se
    assert isinstance(tail, type(original.layer1[0].se))
    for other in (_deepcopy(converted), _pickle(converted), _torch_save(converted)):
        assert type(other.layer1[0].se) is type(tail)
        assert torch.equal(other(X), converted(X))


def test_compiles_without_a_graph_break(model: ResNet) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(X), model(X), 1e-6)


def test_half_precision_and_channels_last(model: ResNet) -> None:
    half = copy.deepcopy(model).half()
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert half(X.half()).dtype == torch.float16
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    assert_close(last(X.to(memory_format=torch.channels_last)), model(X), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast_stays_in_low_precision_through_every_block(model: ResNet, dtype: torch.dtype) -> None:
    dtypes: dict[str, torch.dtype] = {}

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, __, out: dtypes.__setitem__(name, out.dtype)

    watched = copy.deepcopy(model)
    for name, module in watched.named_modules():
        if type(module).__name__ == "Bottleneck":
            module.register_forward_hook(look(name))
    with torch.autocast("cpu", dtype):
        watched(X)
    assert len(dtypes) == 4
    assert set(dtypes.values()) == {dtype}


def test_several_threads_plan_what_one_does() -> None:
    models = [*map(timm.create_model, ("test_resnet", "test_byobnet")), torchvision.models.shufflenet_v2_x0_5()]
    expected = [normfree.plan(model).to_json() for model in models]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: [normfree.plan(model).to_json() for model in models], range(4)))
    assert found == [expected] * 4
