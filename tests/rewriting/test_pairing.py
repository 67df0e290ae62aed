"""Which modules call a layer and its slot together, and that they are otherwise what they were."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
import torchvision
from harness import assert_close, noise, randomise
from readings import plan_of, watched_pairs
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

import normfree
from normfree.errors import UsageError
from normfree.layers.pairs import OneByOne
from normfree.rewriting import pairing
from normfree.rewriting.pairing import Paired

NETWORKS = {
    "timm:resnet10t": 1,
    "timm:resnetv2_18": 0,
    "timm:tf_efficientnet_lite0": 2,
    "timm:repvgg_a0": 0,
    "timm:res2net50_26w_4s": 1,
    "timm:hrnet_w18_small": 2,
    "torchvision:mobilenet_v3_small": 0,
    "torchvision:vgg11_bn": 0,
}
"""How many layers the root calls, which keeps its class, or a text that is not read."""


@pytest.mark.parametrize("name", NETWORKS)
def test_nearly_every_layer_of_a_network_computes_as_one_with_its_slot(name: str) -> None:
    library, _, kind = name.partition(":")
    model = timm.create_model(kind) if library == "timm" else torchvision.models.get_model(kind)
    made = normfree.convert(randomise(model), init="preserve", check=False).eval()
    with watched_pairs(made) as together, torch.no_grad():
        made(noise(2, 3, 64, 64))
    assert together.items() <= plan_of(made).pairs.items()
    assert len(plan_of(made).pairs) - len(together) == NETWORKS[name]


@pytest.fixture(scope="module")
def model() -> Any:
    return normfree.convert(randomise(timm.create_model("resnet18", num_classes=3)), init="preserve").eval()


def test_a_block_is_what_it_was_under_its_own_name(model: Any) -> None:
    block = model.layer1[0]
    assert isinstance(block, Paired)
    assert isinstance(block, BasicBlock)
    assert (type(block).__name__, type(block).__module__) == ("BasicBlock", BasicBlock.__module__)
    assert type(block).__doc__ == BasicBlock.__doc__
    assert vars(type(block)).keys() - vars(BasicBlock).keys() == {"_normfree_before", "_normfree_spec"}
    assert BasicBlock.forward is not type(block).forward
    assert type(block) is type(model.layer1[1]), "alike blocks share their class"


def test_the_root_keeps_its_class(model: Any) -> None:
    assert type(model) is timm.models.resnet.ResNet


def test_pickled_and_copied_it_still_calls_pairs_together(model: Any) -> None:
    x = noise(2, 3, 64, 64)
    with watched_pairs(model) as together:
        expected = model(x)
    assert len(together) == 19
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  # our own bytes
        with watched_pairs(again) as same:
            assert torch.equal(again(x), expected)
        assert same == together
        assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]


def test_where_the_text_has_changed_it_calls_one_by_one(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> None:
        raise ValueError("the text is not known")

    kept = pickle.dumps(model)
    monkeypatch.setattr(pairing, "_MADE", {})
    monkeypatch.setattr(pairing, "with_rows", unknown)
    again, x = pickle.loads(kept), noise(2, 3, 64, 64)  # noqa: S301  # our own bytes
    assert type(again.layer1[0]) is BasicBlock
    with watched_pairs(again) as together:
        found = again(x)
    assert_close(found, model(x), 1e-5)
    assert not any(layer.startswith("layer1") and "downsample" not in layer for layer in together)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_it_cannot_be_scripted_and_says_what_can(model: Any) -> None:
    with pytest.raises(UsageError, match=r"torch\.jit\.script\(normfree\.fuse\(model\)\.eval\(\)\)"):
        torch.jit.script(model.layer1[0])


def test_fused_and_restored_it_has_its_own_class_again(model: Any) -> None:
    for again in (normfree.fuse(model), normfree.restore(model)):
        assert not any(isinstance(m, (Paired, OneByOne)) for m in again.modules())
        assert type(again.layer1[0]) is BasicBlock


class Adn(nn.Sequential):
    """Norm and activation, as MONAI has them."""


class Convolution(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(4, 4, 3, padding=1), Adn(nn.BatchNorm2d(4), nn.ReLU()))


class Stem(nn.Module):
    """A sequence that ends in a convolution; its norm stands beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 4, 1)))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(x)
        return self.norm(x)


class Loop(nn.Module):
    """Goes through lists."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = conv(x)
            x = norm(x)
        return self.norms[1](self.convs[1](x)) if x is None else x


HOLDERS: dict[str, tuple[type[nn.Module], int]] = {
    "sequences in sequences": (Convolution, 1),
    "a sequence and a norm beside it": (Stem, 1),
    "lists": (Loop, 2),
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_a_pair_is_found_where_it_is_held(kind: str) -> None:
    holder, count = HOLDERS[kind]
    original, x = randomise(nn.Sequential(nn.Sequential(holder()))).eval(), noise(2, 4, 6, 6)
    made = normfree.convert(original, init="preserve", inputs=x)
    with watched_pairs(made) as together:
        assert_close(made(x), original(x), 1e-5)
    assert len(together) == len(plan_of(made).pairs) == count
    part = made[0][0]
    assert isinstance(part, holder)
    if kind == "sequences in sequences":
        assert_close(part[0](x), original[0][0][0](x), 1e-6)
        assert_close(made[0][:1](x), original[0][:1](x), 1e-5)


class Asks(nn.Module):
    """Goes another way if a part is of another class than it was."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Stem()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.part(x)
        return y if type(self.part) is Stem else y * 2


def test_a_part_of_which_a_forward_asks_the_class_keeps_it() -> None:
    original, x = randomise(Asks()).eval(), noise(2, 4, 6, 6)
    made = normfree.convert(original, init="preserve", inputs=x)
    assert plan_of(made).unpaired == ("part",)
    assert type(made.part) is Stem
    assert_close(made(x), original(x), 1e-5)


def test_a_subclass_that_is_derived_later_stays_derived(model: Any) -> None:
    block = copy.deepcopy(model.layer1[0])
    block.__class__ = type("Mine", (type(block),), {"extra": 1})
    again = copy.deepcopy(block)
    assert type(again).__name__ == "Mine"
    x = noise(2, 64, 8, 8)
    assert torch.equal(again(x), block(x))
