"""What a norm did, done once with data: unit variance and zero mean behind every layer it used to rescale.

Residual branches that start at zero need none of this. Networks without skip paths, stems, and blocks that change
resolution are not protected: there the scale that He's formula predicts is only right for independent inputs.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from normfree.errors import UsageError, some
from normfree.layers import ChannelAffine, ScaledWeight, alpha_of, alpha_scale
from normfree.plans import PLAN_ATTRIBUTE, Plan
from normfree.tracing.copying import deep_copy
from normfree.tracing.randomness import Still, in_mode
from normfree.training.centring import centre_

__all__ = ["CalibrationWarning", "calibrate", "calibrate_"]

M = TypeVar("M", bound=nn.Module)
_SMALLEST = 1e-12


class CalibrationWarning(UserWarning):
    """Some layers could not be calibrated."""


def calibrate(
    model: M, batches: Tensor | Iterable[Any], *, forward: Callable[[nn.Module, Any], object] | None = None
) -> M:
    """Return a copy of a converted model that is set by real data: from scratch its scale, else only its coordinates.

    ``preserve``: the function stays what it was. Each layer learns as if the mean of what it meets were zero, and a
    classifier as if the norm of what it sees were about four at most; ``convert`` knows both from the norms alone, and
    a batch of your images knows them better. A classifier that was put on after the conversion is taken in.

    ``skipinit``: layers get unit output variance. One sweep over each batch sets every layer that a norm used to
    rescale, in the order in which they run, so that each sees what the calibrated ones before it return: its weight is
    divided by the standard deviation of its output, as LSUV does (Mishkin & Matas, ICLR 2016, algorithm 1), and its
    bias takes away the mean of each channel, as RescaleNet does (NeurIPS 2020). A layer without a bias is divided by
    the root of its second moment instead. Alpha is left out of it: a branch at alpha = 0 is calibrated as if it were
    one.

    The plan of what is returned says what was set.

    Args:
        model: What ``convert`` returned, before training; it is not changed.
        batches: One batch ``(N, C, *)``, or an iterable of a few: tensors, lists of which the first entry is the input
            (as data loaders return them), or mappings of keyword arguments. Several are averaged.
        forward: How to run the model on a batch, where none of these fits.

    Raises:
        UsageError: The model was not converted, or is fused; there is no batch; something is not finite.

    Warns:
        CalibrationWarning: Layers that no batch reached, or whose output is constant, are left as they are and named.

    Example:
        >>> import torch, torchvision, normfree
        >>> model = normfree.convert(torchvision.models.vgg11_bn())
        >>> model = normfree.calibrate(model, torch.randn(8, 3, 64, 64))
        >>> 0.9 < model.features[0](torch.randn(8, 3, 64, 64)).var() < 1.1
        tensor(True)
    """
    with torch.inference_mode(False):
        return calibrate_(deep_copy(model), batches, forward=forward)


@torch.no_grad()
def calibrate_(
    model: M, batches: Tensor | Iterable[Any], *, forward: Callable[[nn.Module, Any], object] | None = None
) -> M:
    """Do in place what :func:`calibrate` does on a copy; if it fails, the model is as it was."""
    plan = Plan.of(model)
    if plan.fused:
        raise UsageError(f"this {type(model).__name__} is fused, and learns in plain coordinates: calibrate before")
    run, reached = forward or _run, set[str]()
    several = [batches] if isinstance(batches, Tensor) else batches
    if plan.init == "preserve":
        with in_mode(model, training=False):
            said = centre_(model, plan, lambda batch: run(model, batch), several)
        model.__dict__[PLAN_ATTRIBUTE] = replace(plan, calibrated=said)
        return model
    layers = _layers(model, plan)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with in_mode(model, training=True), Still():  # in which auxiliary heads run too
            for number, batch in enumerate(several, start=1):
                with _sweep(layers, number, reached):
                    run(model, batch)
                model.load_state_dict(buffers, strict=False)  # norms that stay, and whatever else counts calls
    except BaseException:
        model.load_state_dict(state)
        raise
    if not reached:
        raise UsageError("no layer was reached: there is no batch, or the model calls none of its converted layers")
    left = [name for name in layers if name not in reached]
    if left:
        warnings.warn(f"not calibrated, constant or never reached: {some(left)}", CalibrationWarning, stacklevel=2)
    said = f"unit variance behind {len(layers) - len(left)} of {len(layers)} layers"
    model.__dict__[PLAN_ATTRIBUTE] = replace(plan, calibrated=said)
    return model


def _layers(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """Return the layers that a norm used to rescale."""
    paths = [path for path, _ in plan.weights] + [edit.name for edit in plan.norms if edit.action in ("bias", "affine")]
    return {path: model.get_submodule(path) for path in paths}


def _run(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (list, tuple)) else batch)


@contextlib.contextmanager
def _sweep(layers: Mapping[str, nn.Module], number: int, reached: set[str]) -> Iterator[None]:
    """Calibrate each layer at its first call in one forward pass: the ``number``-th, which counts ``1 / number``."""
    handles = []
    for name, layer in layers.items():
        hooks = _Calibrator(name, number, reached)
        if isinstance(layer, ChannelAffine):
            handles.append(layer.register_forward_pre_hook(hooks.standardize))
            continue
        handles += [layer.register_forward_pre_hook(hooks.before), layer.register_forward_hook(hooks.after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Calibrator:
    """The hooks of one layer in one pass."""

    def __init__(self, name: str, number: int, reached: set[str]) -> None:
        self.name, self.number, self.reached = name, number, reached
        self.alpha: nn.Parameter | None = None
        self.done = False

    def before(self, layer: nn.Module, _: Any) -> None:
        """Take alpha out of the way: what it scales is looked at as if it were one."""
        if isinstance(layer, ScaledWeight):
            self.alpha, layer.raw_alpha = layer.raw_alpha, None

    def standardize(self, slot: nn.Module, args: tuple[Tensor]) -> None:
        """Set the bias, and the gain if there is one, that a norm left behind in its slot, from what comes in."""
        bias, gain = cast(ChannelAffine, slot).bias, cast(ChannelAffine, slot).gain
        if bias is None or self.done:
            return
        self.done = True
        values = args[0].float().movedim(1, 0).flatten(1)
        factor = torch.ones_like(bias) if gain is None else gain
        mean = values.mean(1) * factor + bias
        moment = float((values * factor[:, None]).var(1, unbiased=False).mean())
        if not bool(torch.isfinite(mean).all()):
            raise UsageError(f"{self.name}: its input is not finite on batch {self.number}")
        self.reached.add(self.name)
        bias.sub_((mean / self.number).to(bias.dtype))
        if gain is not None and moment > _SMALLEST:
            gain.mul_(moment ** (-0.5 / self.number))
            bias.mul_(moment ** (-0.5 / self.number))

    def after(self, layer: nn.Module, _: Any, output: Tensor) -> Tensor:
        """Set scale and bias from the output, and return what the layer returns with them."""
        channels = -1 if isinstance(layer, nn.Linear) else 1
        if not self.done:
            self.done = True
            output = self._calibrate(layer, output, channels)
        if isinstance(layer, ScaledWeight) and self.alpha is not None:
            layer.raw_alpha = self.alpha
            alpha = alpha_of(self.alpha, layer.alpha_unit)
            factor = alpha_scale(alpha, layer.alpha_channels, output.shape[channels])
            output = output * (factor if factor.dim() == 0 else _along(factor, output, channels))
        return output

    def _calibrate(self, layer: nn.Module, output: Tensor, channels: int) -> Tensor:
        values = output.float().movedim(channels, 0).flatten(1)
        bias = layer._parameters.get("bias")
        mean = torch.zeros(len(values), device=values.device) if bias is None else values.mean(1)
        moment = float((values - mean[:, None]).square().mean())
        if not torch.isfinite(torch.tensor(moment)):
            raise UsageError(f"{self.name}: its output is not finite on batch {self.number}")
        if moment < _SMALLEST:
            return output
        self.reached.add(self.name)
        factor: float = moment ** (-0.5 / self.number)
        shift = (mean / self.number).to(output.dtype)
        cast(nn.Parameter, layer._parameters["weight"]).mul_(factor)
        if bias is not None:
            bias.sub_(shift).mul_(factor)
        return (output - _along(shift, output, channels)) * factor


def _along(values: Tensor, like: Tensor, dim: int) -> Tensor:
    shape = [1] * like.dim()
    shape[dim] = -1
    return values.reshape(shape)
