"""How models are verified that take more than one tensor or need float32: torchvision's detectors and RAFT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import normfree
from normfree.norms import find_norms
from normfree.proofs.observing import NormSpy, module_stack
from normfree.tracing.inputs import tensors
from normfree.tracing.randomness import Still

SIDE = 96


def verifier(model: nn.Module) -> Callable[[Any], dict[str, Any]] | None:
    """The function that verifies a model of this kind, or `None` if `normfree.verify` can."""
    if hasattr(model, "transform") and hasattr(model, "backbone"):
        return verify_detector
    return verify_flow if hasattr(model, "context_encoder") else None


def verify_detector(model: Any) -> dict[str, Any]:
    """Train with targets and detect, on a real forward, from both starting points.

    What is compared in float64 is what the heads return: with random weights the scores of many boxes are all but
    equal, and which of them come first is decided by rounding.
    """
    if model.transform.fixed_size is None:
        model.transform.min_size, model.transform.max_size = (SIDE,), SIDE
    if hasattr(model, "roi_heads"):
        model.roi_heads.score_thresh = 0.0
        model.rpn._pre_nms_top_n = model.rpn._post_nms_top_n = {"training": 20, "testing": 20}
    images, targets = example()
    preserved = normfree.convert(model.double(), init="preserve")
    expected, found = (raw_outputs(m.eval(), [x.double() for x in images]) for m in (model, preserved))
    converted = normfree.convert(model.float(), init="skipinit").train()
    with module_stack(converted) as stack, NormSpy(images, stack) as spy, Still():
        losses = converted(images, targets)
        together = tensors(converted.backbone(torch.stack(images)))
        alone = tensors(converted.backbone(torch.stack(images[:1])))
    torch.stack(list(losses.values())).sum().backward()
    return verdict(converted, images[0], (expected, found), ([x[:1] for x in together], alone), 1e-5, spy)


def raw_outputs(model: Any, images: list[Tensor]) -> list[Tensor]:
    """Detect, and return what backbone and heads computed on the way."""
    seen: list[Tensor] = []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, __, out: seen.extend(tensors(out)))
        for name in ("backbone", "head", "rpn.head", "roi_heads.box_predictor", "roi_heads.mask_head")
        if hasattr(model, name.partition(".")[0]) and (name.count(".") == 0 or has(model, name))
    ]
    with torch.no_grad():
        detections = model(images)
    for handle in handles:
        handle.remove()
    if len(detections) != len(images) or not seen:
        raise ValueError("the detector returned something else than a result an image")
    return seen


def has(model: nn.Module, name: str) -> bool:
    """Whether a module is there at a dotted name."""
    return any(known == name for known, _ in model.named_modules())


def example() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images with one object each, with a mask and keypoints for the detectors that learn them."""
    images = list(torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)))
    mask = torch.zeros(1, SIDE, SIDE, dtype=torch.uint8)
    mask[:, 16:72, 16:80] = 1
    keypoints = torch.tensor([[[20.0, 20.0, 1.0]] * 17])
    target = {"boxes": torch.tensor([[16.0, 16.0, 80.0, 72.0]]), "labels": torch.tensor([1])}
    target |= {"masks": mask, "keypoints": keypoints}
    return images, [target, dict(target)]


def verify_flow(model: Any) -> dict[str, Any]:
    """RAFT makes float32 grids in its forward, so only the encoder, which holds every norm, is compared in float64."""
    pair = torch.rand(2, 2, 3, 128, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1
    preserved = normfree.convert(model.double(), init="preserve")
    with torch.no_grad():
        expected = tensors(model.eval().context_encoder(pair[0].double()))
        found = tensors(preserved.eval().context_encoder(pair[0].double()))
    converted = normfree.convert(model.float(), init="skipinit").train()
    with module_stack(converted) as stack, NormSpy(list(pair), stack) as spy, Still():
        flows = converted(pair[0], pair[1], num_flow_updates=2)
        alone = converted(pair[0, :1], pair[1, :1], num_flow_updates=2)
    torch.stack([flow.square().mean() for flow in flows]).sum().backward()
    return verdict(converted, pair[0, 0], (expected, found), ([flow[:1] for flow in flows], alone), 1e-3, spy)


def verdict(
    converted: nn.Module,
    sample: Tensor,
    preserve: tuple[list[Tensor], list[Tensor]],
    batch: tuple[list[Tensor], list[Tensor]],
    rounding: float,
    spy: NormSpy,
) -> dict[str, Any]:
    """Say what fails, with the figures; the batch is compared in float32, to `rounding`."""
    error, dependence = largest_error(*preserve), largest_error(*batch)
    grads = [p.grad for p in converted.parameters() if p.grad is not None]
    checks = {
        f"preserve proof 3: relative error {error:.1e}": error <= 1e-9,
        f"skipinit proof 1: norms left {list(find_norms(converted))[:3]}": not find_norms(converted),
        f"skipinit proof 1: a norm runs in {spy.seen[:1]}": not spy.seen,
        f"skipinit proof 2: {dependence:.1e}": dependence <= rounding,
        "skipinit proof 5: gradients are not finite": bool(grads) and all(bool(g.isfinite().all()) for g in grads),
    }
    return {
        "input": "x".join(map(str, (2, *sample.shape))),
        "status": "; ".join(what for what, holds in checks.items() if not holds) or "ok",
        "preserve_error": f"{error:.1e}",
        "batch_error": f"{dependence:.1e}",
        "gradients": len(grads),
    }


def largest_error(expected: list[Tensor], found: list[Tensor]) -> float:
    """Largest difference over the largest value, over all outputs; infinite if the shapes differ."""
    if [x.shape for x in expected] != [x.shape for x in found]:
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(expected, found, strict=True) if a.numel()]
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-300)) for a, b in pairs)
