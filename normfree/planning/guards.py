"""Early exits: what cannot be converted is refused before anything is done, with the place and the way out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from types import MethodType

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from normfree.code.held import held_by
from normfree.edits import Init
from normfree.errors import AlreadyConvertedError, UsageError, WrappedModelError, some
from normfree.layers import is_normfree
from normfree.layers.reparametrized import ways_out
from normfree.norms import Norm, find_norms, is_norm, looks_like_norm
from normfree.options import Patterns, matches
from normfree.plans import PLAN_ATTRIBUTE

__all__ = ["check_is_module", "check_model", "check_wrapping", "module_problems"]


def check_is_module(model: object) -> None:
    """Refuse what is no module: a state dict, or a class that has not been called."""
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}: call it" if isinstance(model, type) else type(model).__name__
        raise UsageError(f"expected a torch.nn.Module, got {got}")


def check_model(model: nn.Module) -> None:
    """Refuse what is no model, is wrapped, is itself a norm, or was converted before."""
    check_is_module(model)
    check_wrapping(model)
    if is_norm(model) or looks_like_norm(model) == "subclass":
        raise UsageError(
            f"the model itself is a {type(model).__name__}; nothing can take its place: "
            "wrap it, nn.Sequential(norm), or convert the module that holds it"
        )
    ours = [name for name, module in model.named_modules() if is_normfree(module)]
    if ours or PLAN_ATTRIBUTE in model.__dict__:
        norms = list(find_norms(model))
        left = f"; norms left or added since: {', '.join(norms[:5])}" if norms else ""
        where = f" (for example {ours[0]!r})" if ours else ""
        raise AlreadyConvertedError(
            f"this {type(model).__name__} has been converted already{where}{left}. Convert the original model instead"
        )


def check_wrapping(model: nn.Module) -> None:
    """Refuse a model inside DDP, FSDP, ``torch.compile``, TorchScript, an average of weights or Opacus."""
    for cls in type(model).__mro__:
        inner = _WRAPPERS.get(f"{cls.__module__}.{cls.__qualname__}")
        if inner is not None:
            raise WrappedModelError(
                f"the model is wrapped in {type(model).__name__}: convert what is inside ({inner}), then wrap it again"
            )
    if model._compiled_call_impl is not None:
        raise WrappedModelError("the model is compiled in place (model.compile()): convert it before compiling")
    if "autograd_grad_sample_hooks" in model.__dict__:
        raise WrappedModelError("Opacus has hooked the model: convert it before make_private")
    first = {type(module): name for name, module in reversed(list(model.named_modules()))}
    for kind, name in first.items():
        names = {cls.__name__ for cls in kind.__mro__}
        if "FSDPModule" in names:
            raise WrappedModelError(
                f"{name or 'the model'} is sharded by fully_shard: convert the model before sharding it"
            )
        if not names.isdisjoint(_HOOKING):
            raise WrappedModelError(f"{name} is wrapped in {kind.__name__}: convert the model before wrapping it")


_HOOKING = ("FullyShardedDataParallel", "DistributedDataParallel", "AbstractGradSampleModule")
"""Wrappers that hang hooks on the parameters they find: new ones would be passed by."""

_WRAPPERS = {
    "torch.nn.parallel.distributed.DistributedDataParallel": "model.module",
    "torch.nn.parallel.data_parallel.DataParallel": "model.module",
    "torch.optim.swa_utils.AveragedModel": "model.module",
    "timm.utils.model_ema.ModelEmaV2": "model.module",
    "timm.utils.model_ema.ModelEmaV3": "model.module",
    "opacus.grad_sample.gsm_base.AbstractGradSampleModule": "model._module",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "model.module",
    "torch._dynamo.eval_frame.OptimizedModule": "model._orig_mod",
    "torch.jit._script.ScriptModule": "the Python module it was scripted from",
}


def module_problems(model: nn.Module, norms: Mapping[str, Norm], init: Init, exclude: Patterns) -> dict[str, str]:
    """Collect what stands in the way of a conversion, by module."""
    found: dict[str, str] = {}
    unknown: dict[type[nn.Module], list[str]] = {}
    bound = {id(m.__self__) for m in held_by(model) if isinstance(m, MethodType) and m.__name__ == "forward"}
    for name, module in model.named_modules():
        problem = _module_problem(module, norms.get(name), init)
        if name in norms and id(module) in bound:
            problem = "something holds its method forward, which is that of a norm; let it hold the module instead"
        if problem is None or matches(name, exclude):
            continue
        found[name] = f"{name} ({type(module).__qualname__}): {problem}"
        if looks_like_norm(module) is not None:
            unknown.setdefault(type(module), []).append(name)
    for first, *more in unknown.values():  # one description does for all of a class
        found[first] += f"; so are {some(more)}" if more else ""
        found = {name: problem for name, problem in found.items() if name not in more}
    return found


def _broken(norm: Norm) -> str | None:
    """Name the tensor of a norm that makes its output infinite or no number at all."""
    every = {"running mean": norm.mean, "running variance": norm.var, "weight": norm.weight, "bias": norm.bias}
    found = {what: tensor.detach() for what, tensor in every.items() if tensor is not None and tensor.numel()}
    if "running variance" not in found or any(tensor.is_meta for tensor in found.values()):
        return None
    for what, tensor in found.items():
        low, high = (float(value) for value in torch.aminmax(tensor))  # not a number if any entry is not
        if what == "running variance" and low < 0:
            return f"its running variance is negative ({low:g}); the checkpoint is damaged"
        if not (math.isfinite(low) and math.isfinite(high)):
            return f"its {what} is not finite; the checkpoint is damaged"
    return None


def _module_problem(module: nn.Module, norm: Norm | None, init: Init) -> str | None:
    if norm is not None:
        if norm.problem is None and norm.mean is None and init == "preserve":
            return (
                "tracks no running statistics, so there is nothing to preserve; exclude it, or use init='skipinit', "
                "which draws the weights anew"
            )
        plain = next((f"is {how}, and then convert" for how in ways_out(module)), None)
        return (
            norm.problem
            or plain
            or (_broken(norm) if init == "preserve" else None)
            or _why_not_as_described(module, norm)
        )
    if looks_like_norm(module) == "subclass":
        return "an unknown batch norm with a forward of its own; describe it with normfree.register_norm"
    if looks_like_norm(module) == "statistics":
        return "holds running statistics but is no norm known here; describe it with normfree.register_norm"
    if isinstance(module, torch.jit.ScriptModule) and "BatchNorm" in str(getattr(module, "original_name", "")):
        return "a scripted batch norm; convert before scripting"
    if isinstance(module, LazyModuleMixin):
        return "has no shape yet: run one forward pass, then convert"
    return None


def _why_not_as_described(module: nn.Module, norm: Norm) -> str | None:
    """Run a norm of a class that is not torch's, without its hooks, and say so if it does not do what is said of it."""
    tensors = [*module.parameters(), *module.buffers()]
    own = not type(module).__module__.startswith(("torch.", "timm.", "torchvision."))
    if not own or norm.mean is None or norm.problem is not None or any(t.is_meta for t in tensors):
        return None
    trial, bare = type(module).__new__(type(module)), vars(nn.Module())
    trial.__dict__.update(module.__dict__ | {name: value for name, value in bare.items() if "hook" in name})
    trial.__dict__["training"] = False
    gain, shift = norm.affine()
    for places in ((2, 2), (), (2,), (2, 2, 2)):
        shape = [1, norm.features, *(1 for _ in places)]
        x = torch.linspace(-2, 2, 3 * gain.numel(), dtype=norm.mean.dtype, device=norm.mean.device)
        x = x.reshape(3, -1, *shape[2:]).expand(-1, -1, *places)
        with contextlib.suppress(Exception), torch.no_grad():  # it may take other shapes
            wanted = gain.reshape(shape) * x.double() + shift.reshape(shape)
            wanted = wanted if norm.act is None else norm.act(wanted.to(x.dtype)).double()
            found = trial(x.clone()).double()
            if not torch.allclose(found, wanted, rtol=0.02, atol=0.02 * float(wanted.abs().max())):
                return "computes something else than its description says; describe it with normfree.register_norm"
            return None
    return None
