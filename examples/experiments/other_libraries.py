"""What becomes of networks of other libraries, as their users would convert them: a table like the support table.

Each is built as its library's own documentation builds it, small where that is an option, with random statistics; it is
planned and timed, converted with `preserve`, and its output in float64 compared with the original's. None of these
libraries is needed otherwise; what is not installed is left out.

Run: python examples/experiments/other_libraries.py  # writes examples/results/other_libraries.csv and .md
"""

from __future__ import annotations

import csv
import importlib
import importlib.metadata
import importlib.util
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support_table import randomise
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import normfree
from normfree.tracing.copying import in_float64
from normfree.tracing.inputs import tensors
from normfree.tracing.still import Still

TABLE = Path(__file__).parents[1] / "results" / "other_libraries.csv"
COLUMNS = ("library", "model", "inputs", "norms", "fold", "affine", "residual", "parallel", "merge", "alphas")
COLUMNS += ("declined", "unseen", "plan_seconds", "preserve_error", "why", "version")
Network = tuple[Callable[[], nn.Module], Any]
IMAGE = torch.randn(2, 3, 64, 64)


def _new(path: str, *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    module, _, name = path.rpartition(".")
    return lambda: getattr(importlib.import_module(module), name)(*args, **kwargs)


def _transformers(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A model of transformers from a configuration of its own, without weights."""

    def build() -> nn.Module:
        library: Any = importlib.import_module("transformers")
        config = getattr(
            library,
            name.replace("ForImageClassification", "")
            .replace("ForDepthEstimation", "")
            .replace("ForSemanticSegmentation", "")
            .replace("ForObjectDetection", "")
            + "Config",
        )
        made: nn.Module = getattr(library, name)(config(**options))
        return made

    return build


NETWORKS: dict[str, Network] = {
    "transformers ResNetForImageClassification": (
        _transformers("ResNetForImageClassification", depths=[2, 2, 2, 2]),
        None,
    ),
    "transformers MobileNetV2ForImageClassification": (_transformers("MobileNetV2ForImageClassification"), None),
    "transformers MobileNetV1ForImageClassification": (_transformers("MobileNetV1ForImageClassification"), None),
    "transformers RegNetForImageClassification": (_transformers("RegNetForImageClassification"), None),
    "transformers EfficientNetForImageClassification": (
        _transformers("EfficientNetForImageClassification", image_size=64),
        None,
    ),
    "transformers LevitForImageClassification": (_transformers("LevitForImageClassification"), None),
    "transformers DPTForDepthEstimation": (
        _transformers(
            "DPTForDepthEstimation",
            image_size=64,
            hidden_size=96,
            num_attention_heads=2,
            intermediate_size=96,
            neck_hidden_sizes=[32, 32, 32, 32],
            fusion_hidden_size=32,
            use_batch_norm_in_fusion_residual=True,
        ),
        None,
    ),
    "transformers SegformerForSemanticSegmentation": (_transformers("SegformerForSemanticSegmentation"), None),
    "transformers BeitForSemanticSegmentation": (
        _transformers(
            "BeitForSemanticSegmentation",
            image_size=64,
            hidden_size=96,
            num_attention_heads=2,
            num_hidden_layers=4,
            out_indices=[1, 2, 3, 4],
            intermediate_size=96,
        ),
        None,
    ),
    "transformers DetrForObjectDetection": (
        _transformers(
            "DetrForObjectDetection",
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
        ),
        None,
    ),
    "transformers RTDetrForObjectDetection": (
        _transformers("RTDetrForObjectDetection", decoder_layers=1, d_model=64, encoder_hidden_dim=64),
        None,
    ),
    "transformers DFineForObjectDetection": (_transformers("DFineForObjectDetection", decoder_layers=1), None),
    "monai EfficientNetBN": (_new("monai.networks.nets.EfficientNetBN", "efficientnet-b0", pretrained=False), None),
    "monai HighResNet": (_new("monai.networks.nets.HighResNet", 3, 1), None),
    "monai ResNet, shortcut A": (
        _new(
            "monai.networks.nets.ResNet",
            "basic",
            [2, 2, 2, 2],
            [8, 16, 32, 64],
            spatial_dims=3,
            n_input_channels=1,
            shortcut_type="A",
        ),
        None,
    ),
    "monai ResNet, shortcut B": (
        _new(
            "monai.networks.nets.ResNet",
            "bottleneck",
            [1, 1, 1, 1],
            [8, 16, 32, 64],
            spatial_dims=2,
            n_input_channels=3,
            shortcut_type="B",
        ),
        None,
    ),
    "monai AHNet": (_new("monai.networks.nets.AHNet", spatial_dims=3), torch.randn(2, 1, 64, 64, 32)),
    "monai SegResNetVAE": (
        _new(
            "monai.networks.nets.SegResNetVAE",
            (32, 32),
            spatial_dims=2,
            in_channels=1,
            norm=("batch", {"affine": True}),
        ),
        torch.randn(2, 1, 32, 32),
    ),
    "monai DynUNet": (
        _new("monai.networks.nets.DynUNet", 2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], norm_name="batch", res_block=True),
        None,
    ),
    "monai UNet": (_new("monai.networks.nets.UNet", 2, 1, 2, (8, 16, 32), (2, 2), num_res_units=2, norm="batch"), None),
    "monai DenseNet121": (_new("monai.networks.nets.DenseNet121", 2, 1, 2), None),
    "kornia EfficientViT-b0": (_new("kornia.contrib.models.efficient_vit.backbone.efficientvit_backbone_b0"), None),
    "kornia HardNet": (_new("kornia.feature.HardNet", False), None),
    "speechbrain ECAPA_TDNN": (
        _new("speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN", 80, channels=[64, 64, 64, 64, 192]),
        torch.randn(2, 40, 80),
    ),
    "braindecode EEGNetv4": (_new("braindecode.models.EEGNet", 22, 4, n_times=256), torch.randn(2, 22, 256)),
    "braindecode ShallowFBCSPNet": (
        _new("braindecode.models.ShallowFBCSPNet", 22, 4, n_times=256),
        torch.randn(2, 22, 256),
    ),
    "braindecode EEGResNet": (_new("braindecode.models.EEGResNet", 22, 4, n_times=512), torch.randn(2, 22, 512)),
    "tsai InceptionTime": (_new("tsai.models.InceptionTime.InceptionTime", 3, 4), torch.randn(2, 3, 64)),
    "tsai TST": (_new("tsai.models.TST.TST", 3, 4, 64, d_model=32, d_ff=32), torch.randn(2, 3, 64)),
    "tsai PatchTST": (_new("tsai.models.PatchTST.PatchTST", 3, 4, 64), torch.randn(2, 3, 64)),
    "ultralytics yolov8n": (_new("ultralytics.nn.tasks.DetectionModel", "yolov8n.yaml", verbose=False), IMAGE),
    "ultralytics yolo11n": (_new("ultralytics.nn.tasks.DetectionModel", "yolo11n.yaml", verbose=False), IMAGE),
}


def measure(name: str, build: Callable[[], nn.Module], inputs: Any) -> dict[str, Any]:
    """Plan and convert one network, and compare what it computes."""
    library, _, model_name = name.partition(" ")
    row: dict[str, Any] = {"library": library, "model": model_name, "version": importlib.metadata.version(library)}
    model = randomise(build()).eval()
    start = time.perf_counter()
    plan = normfree.plan(model, init="skipinit", inputs=inputs)
    row["plan_seconds"] = round(time.perf_counter() - start, 2)
    actions = Counter(e.action for e in normfree.plan(model, init="preserve", inputs=inputs).norms)
    kinds = Counter(total.kind for total in plan.sums)
    row |= {"inputs": plan.looked, "norms": len(plan.norms), "fold": actions["fold"], "affine": actions["affine"]}
    row |= {kind: kinds[kind] for kind in ("residual", "parallel", "merge")}
    row |= {"alphas": len(plan.alphas), "declined": len(plan.declined), "unseen": len(plan.unseen)}
    row["why"] = "; ".join(dict.fromkeys([*plan.declined, *(why for _, why in plan.opaque)]))[:300]
    row["preserve_error"] = f"{_error(model, inputs):.1e}"
    return row


@torch.no_grad()
def _error(model: nn.Module, inputs: Any) -> float:
    """How far `preserve` is from the original, in float64, relative to the largest value of each output."""
    from normfree.tracing.inputs import arguments
    from normfree.tracing.trace import example_input

    args, kwargs = arguments(example_input(model) if inputs is None else inputs)
    args, kwargs = tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, (args, kwargs)
    )
    original = in_float64(model).eval()
    converted = normfree.convert(original, init="preserve", inputs=kwargs or args).eval()
    with Still():
        pairs = zip(tensors(original(*args, **kwargs)), tensors(converted(*args, **kwargs)), strict=True)
        found = [float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in pairs if a.is_floating_point()]
    return max(found)


def main() -> None:
    """Measure every network whose library is here, and write the table and its page."""
    warnings.simplefilter("ignore")
    rows = []
    for name, (build, inputs) in NETWORKS.items():
        if importlib.util.find_spec(name.partition(" ")[0]) is None:
            continue
        try:
            rows.append(measure(name, build, inputs))
        except Exception as error:  # another version of a library builds its networks otherwise
            print(f"{name}: {type(error).__name__}: {error}"[:300], flush=True)
            continue
        print({key: rows[-1].get(key) for key in COLUMNS[1:-1]}, flush=True)
    with TABLE.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    shown = ("library", "model", "norms", "residual", "alphas", "declined", "unseen", "plan_seconds", "preserve_error")
    lines = ["# Other libraries", "", __doc__.split("\n\n")[1].replace("\n", " "), ""]
    lines += [
        f"torch {torch.__version__}; " + ", ".join(dict.fromkeys(f"{r['library']} {r['version']}" for r in rows)),
        "",
    ]
    lines += [f"| {' | '.join(shown)} |", f"|{'---|' * len(shown)}"]
    lines += [f"| {' | '.join(str(row[key]) for key in shown)} |" for row in rows]
    TABLE.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
