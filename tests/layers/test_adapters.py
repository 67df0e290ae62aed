"""Adapters (LoRA, as PEFT does it): refused by name where they would be merged wrongly, exact on a fused model."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import timm
import torch
from harness import assert_close, noise, randomise
from torch import Tensor, nn

import normfree
from normfree.errors import UsageError
from normfree.layers import ScaledWeight

X = noise(2, 3, 32, 32, dtype=torch.float64)


class Adapted(nn.Module):
    """What PEFT puts around a convolution: two more layers of its type, merged into its weight."""

    def __init__(self, layer: nn.Conv2d, rank: int = 2) -> None:
        super().__init__()
        self.layer = layer
        options = {"kernel_size": layer.kernel_size, "stride": layer.stride, "padding": layer.padding}
        self.down = type(layer)(layer.in_channels, rank, bias=False, **options).to(layer.weight)
        self.up = type(layer)(rank, layer.out_channels, kernel_size=1, bias=False).to(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))

    @torch.no_grad()
    def merged(self) -> nn.Conv2d:
        self.layer.weight.data += torch.einsum("orhw,rikl->oikl", self.up.weight, self.down.weight)
        return self.layer


def converted() -> nn.Module:
    return normfree.convert(randomise(timm.create_model("test_resnet", num_classes=3)).double(), init="preserve").eval()


def test_a_converted_layer_refuses_an_adapter_and_names_the_way_out() -> None:
    model = converted()
    assert isinstance(model.layer1[0].conv2, ScaledWeight)
    with pytest.raises(UsageError, match=r"ScaledConv2d computes with another weight.*normfree\.fuse\(model\) first"):
        Adapted(model.layer1[0].conv2)
    for layer in (model.layer1[0].conv2, model.fc):
        with pytest.raises(UsageError, match=r"normfree\.fuse\(model\) first"):
            hasattr(layer, "base_layer")  # how PEFT finds the layer that it wraps


@torch.no_grad()
def test_an_adapter_merges_exactly_once_the_model_is_fused() -> None:
    model = converted()
    fused = normfree.fuse(model)
    layer = fused.layer1[0].conv2 = Adapted(fused.layer1[0].conv2)
    adapted = fused(X)
    assert float((adapted - model(X)).abs().max()) > 1e-6
    fused.layer1[0].conv2 = layer.merged()
    assert_close(fused(X), adapted)


@torch.no_grad()
def test_peft_itself() -> None:
    peft: Any = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=r"layer.*conv[12]|fc", init_lora_weights=False)
    model = converted()
    with pytest.raises(UsageError, match=r"normfree\.fuse\(model\) first"):
        peft.get_peft_model(model, config)
    fused = normfree.fuse(converted())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(fused, config).double().eval()
        expected = adapted(X)
        found = adapted.merge_and_unload()(X)
    assert_close(found, expected)
    assert float((expected - model(X)).abs().max()) > 1e-3
