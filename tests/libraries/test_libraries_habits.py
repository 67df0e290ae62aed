"""More habits of other libraries: norms inside convolutions, looked up by name, read, asked for their type, kept twice.

What a forward does with a norm besides calling it must survive the norm's removal, or be refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import pytest
import torch
import torch.nn.functional as F
from harness import assert_close, assert_preserved, both, noise, prove, randomise
from readings import actions, alphas, kinds, norms, plan_of
from torch import Tensor, nn

import normfree
from normfree.errors import NormfreeError, UnsupportedModelError


class NormInside(nn.Conv2d):
    """A convolution that holds its norm and its activation."""

    def __init__(self, *args: Any, norm: nn.Module | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return x if self.norm is None else self.norm(x)


class SamePadding(nn.Conv2d):
    """Pads by what the input's size asks for."""

    def forward(self, x: Tensor) -> Tensor:
        size, kernel, stride = x.shape[-1], self.kernel_size[0], self.stride[0]
        pad = max((-(size // -stride) - 1) * stride + kernel - size, 0)
        if pad > 0:
            x = F.pad(x, [pad // 2, pad - pad // 2] * 2)
        return F.conv2d(x, self.weight, self.bias, self.stride)


class LookedUp(nn.Module):
    """A convolution, its norm under a name of the caller's choice behind a property, and an order to run them in."""

    def __init__(self, features: int = 4, act: bool = True) -> None:
        super().__init__()
        self.conv, self.norm_name = nn.Conv2d(features, 4, 3, padding=1, bias=False), "bn1"
        self.add_module(self.norm_name, nn.BatchNorm2d(4))
        self.activate = nn.ReLU(inplace=True) if act else None

    @property
    def norm(self) -> nn.Module:
        return cast(nn.Module, getattr(self, self.norm_name))

    def forward(self, x: Tensor, activate: bool = True, norm: bool = True) -> Tensor:
        for layer in ("conv", "norm", "act"):
            if layer == "conv":
                x = self.conv(x)
            elif layer == "norm" and norm:
                x = self.norm(x)
            elif layer == "act" and activate and self.activate is not None:
                x = self.activate(x)
        return x


class Bottleneck(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(x)
        out += x
        return F.relu_(out)


def _norm_inside() -> nn.Module:
    return NormInside(4, 4, 3, padding=1, bias=False, norm=nn.BatchNorm2d(4))


def _same() -> list[nn.Module]:
    return [SamePadding(4, 4, 3, bias=False), nn.BatchNorm2d(4)]


BRANCHES: dict[str, Callable[[], list[nn.Module]]] = {
    "norm inside the convolution": lambda: [_norm_inside(), nn.ReLU(), _norm_inside()],
    "same padding": lambda: [*_same(), nn.SiLU(inplace=True), *_same()],
    "norm looked up by name": lambda: [LookedUp(), LookedUp(act=False)],
}


@both
@pytest.mark.parametrize("how", BRANCHES)
def test_branch_of_layers_of_the_libraries_own(how: str, init: str) -> None:
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), Bottleneck(*BRANCHES[how]()), Bottleneck(*BRANCHES[how]())))
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert (len(alphas(converted)), kinds(converted)) == (2, ["residual", "residual"])
    assert norms(converted) == []
    assert_preserved(model, noise(2, 3, 6, 6))


class ByIndex(nn.Module):
    """Layers carry where their input comes from, and the model keeps the outputs that somebody asks for later."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.SiLU(inplace=True)
        self.model = nn.Sequential(*conv, nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), Concatenate())
        for index, layer in enumerate(self.model):
            layer.index, layer.source = index, (-1,) if index < 5 else (-1, 2)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for layer in self.model:
            inputs = [x if source == -1 else kept[source] for source in cast(Any, layer).source]
            x = layer(inputs if len(inputs) > 1 else inputs[0])
            kept.append(x)
        return x


class Concatenate(nn.Module):
    def forward(self, xs: list[Tensor]) -> Tensor:
        return torch.cat(xs, 1)


@both
def test_attributes_hung_on_a_norm_stay_on_what_takes_its_place(init: str) -> None:
    model = randomise(ByIndex())
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert cast(Any, converted.model[1]).index == 1


class Reading(nn.Module):
    def __init__(self, read: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.read = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.bn, self.bn(self.conv(x)))


READS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "number of features": lambda bn, x: x.reshape(-1, bn.num_features, 6, 6),
    "eps": lambda bn, x: x + bn.eps,
    "dtype of the weight": lambda bn, x: x.to(bn.weight.dtype),
    "weight": lambda bn, x: x * bn.weight.abs().sum(),
    "running variance": lambda bn, x: x * bn.running_var.sum(),
}


def _right_or_refused(model: nn.Module, *inputs: Tensor, match: str) -> None:
    """What the forward does with its norm is kept, or the norm is refused by name: never a wrong answer."""
    inits: tuple[Literal["preserve", "skipinit"], ...] = ("preserve", "skipinit")
    for init in inits:
        try:
            converted = normfree.convert(model, init=init, inputs=inputs)
        except UnsupportedModelError as error:
            assert match in str(error)  # noqa: PT017  # a refusal is one of two right answers
        else:
            assert normfree.verify(converted, model, inputs).ok


@pytest.mark.parametrize("what", READS)
def test_what_a_forward_reads_of_a_norm_is_still_there_or_refused(what: str) -> None:
    _right_or_refused(randomise(Reading(READS[what])), noise(2, 3, 6, 6), match="bn")


class Hidden(nn.Module):
    """Registers its norm, and calls it by a second reference that torch knows nothing of."""

    def __init__(self, hide: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        object.__setattr__(self, "kept", hide(self.bn))

    def forward(self, x: Tensor) -> Tensor:
        kept: Any = self.kept
        kept = kept[0] if isinstance(kept, (list, tuple)) else kept["bn"] if isinstance(kept, dict) else kept
        return cast(Tensor, kept(self.conv(x)))


HIDDEN: dict[str, Callable[[nn.Module], Any]] = {
    "list": lambda bn: [bn],
    "tuple": lambda bn: (bn,),
    "dict": lambda bn: {"bn": bn},
    "attribute": lambda bn: bn,
    "bound method": lambda bn: bn.forward,
}


@pytest.mark.parametrize("how", HIDDEN)
def test_norm_called_by_a_second_reference_is_replaced_there_too_or_refused(how: str) -> None:
    _right_or_refused(randomise(Hidden(HIDDEN[how])).double(), noise(2, 3, 6, 6, dtype=torch.float64), match="bn")


class Iterating(nn.Module):
    """Runs the layers of a container one by one, keeps raw outputs, and has an activation that writes in place."""

    def __init__(self) -> None:
        super().__init__()
        conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.layers = nn.Sequential(conv, norm, nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3))

    def forward(self, x: Tensor) -> list[Tensor]:
        kept = []
        for layer in self.layers:
            x = layer(x)
            if x.shape[1] == 4:
                kept.append(x)
        return kept


def test_nothing_writes_into_what_an_untraceable_root_keeps() -> None:
    converted = normfree.convert(Iterating(), init="skipinit")
    x = noise(2, 3, 8, 8)
    assert_close(converted(x)[0], converted.layers[0](x), 0)


@both
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_part_is_refused_by_name(init: Any) -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    with pytest.raises(UnsupportedModelError, match=r"1\.1 \(.*\): a scripted batch norm"):
        normfree.plan(nn.Sequential(nn.Conv2d(3, 4, 1), scripted), init=init)


@both
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_part_without_a_norm_learns_by_itself(init: str) -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), scripted, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    converted = prove(model, noise(2, 3, 8, 8), init=init)
    converted(noise(2, 3, 8, 8)).square().sum().backward()
    assert all(p.grad is not None for p in converted[2].parameters())
    assert all(p.grad is None for p in model.parameters()), "torch's own copy would teach the original"


def test_norm_that_transposes_is_refused_by_name() -> None:
    class Transposed(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    with pytest.raises(NormfreeError, match=r"1 \(.*Transposed\).*register_norm"):
        normfree.plan(nn.Sequential(nn.Linear(5, 6), Transposed(6)))


@both
def test_norm_chosen_by_an_attribute_may_be_chosen_anew(init: str) -> None:
    class Domains(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.domain = nn.Conv2d(3, 4, 1), "a"
            self.bn = nn.ModuleDict({"a": nn.BatchNorm2d(4), "b": nn.BatchNorm2d(4)})

        def forward(self, x: Tensor) -> Any:
            return self.bn[self.domain](self.conv(x))

    model = randomise(Domains())
    converted = prove(model, noise(2, 3, 6, 6), init=init)
    assert "may take its place" in plan_of(converted).norms[0].reason
    for chosen in (converted, model):
        chosen.__dict__["domain"] = "b"
    if init == "preserve":
        assert_close(converted.eval()(noise(2, 3, 6, 6)), model.eval()(noise(2, 3, 6, 6)), 1e-5)


@both
def test_tokens_transposed_around_their_norm(init: str) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.bn = nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Any:
            y = self.bn(self.one(x).transpose(1, 2)).transpose(1, 2)
            return x + self.two(F.gelu(y))

    model = randomise(nn.Sequential(nn.Linear(5, 6), Tokens(), Tokens()))
    converted = prove(model, noise(2, 7, 5), init=init)
    assert alphas(converted) == ["1.two", "2.two"]
    assert set(actions(converted).values()) == {"fold"}
    assert_preserved(model, noise(2, 7, 5))
