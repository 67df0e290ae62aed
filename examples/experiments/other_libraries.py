"""What becomes of networks of other libraries, as their users would convert them: a table like the support table.

Each is built as its library's own documentation builds it, small where that is an option, with random statistics; it is
planned, converted from both starting points, and proven on white noise. None of these libraries is needed otherwise;
what is not installed is left out, and keeps the rows that it has. Rows are of different commits; a network is measured
anew when it is named.

Run: python examples/experiments/other_libraries.py [PART OF A NAME ...]  # writes examples/results/other_libraries.*
"""

from __future__ import annotations

import csv
import functools
import importlib
import importlib.metadata
import importlib.util
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from support_table import randomise
from torch import nn

import normfree
from normfree.errors import one_line

TABLE = Path(__file__).parents[1] / "results" / "other_libraries.csv"
SHOWN = ("library", "model", "norms", "unseen", "residual", "alphas", "declined", "parallel", "merge")
SHOWN += ("plan_seconds", "preserve", "preserve_error", "skipinit")
COLUMNS = (*SHOWN, "fold", "affine", "inputs", "why", "version")
BATCH = ("batch", {"affine": True})
SMALL = {"image_size": 64, "hidden_size": 96, "num_attention_heads": 2, "intermediate_size": 96}
DETR: dict[str, Any] = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
DETR |= {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
NETWORKS: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], Any]] = {}
"""By name: what builds it, its arguments, and the shape of its input if it has to be told."""


def _network(name: str, path: str, *args: Any, shape: tuple[int, ...] | None = None, **options: Any) -> None:
    NETWORKS[name] = path, args, options, None if shape is None else torch.randn(shape)


def _transformers(name: str, head: str = "ForImageClassification", **options: Any) -> None:
    """A model of transformers from a configuration of its own, without weights."""
    _network(f"transformers {name}", f"transformers.{name}{head}", f"transformers.{name}Config", **options)


_transformers("ResNet", depths=[2, 2, 2, 2])
_transformers("MobileNetV1")
_transformers("MobileNetV2")
_transformers("RegNet")
_transformers("EfficientNet", image_size=64)
_transformers("Levit")
_transformers("SwiftFormer", depths=[1, 1, 1, 1])
_transformers("MobileViT", image_size=64)
_transformers("HGNetV2")
_transformers("TextNet")
_transformers(
    "DPT",
    "ForDepthEstimation",
    **SMALL,
    neck_hidden_sizes=[32] * 4,
    fusion_hidden_size=32,
    use_batch_norm_in_fusion_residual=True,
)
_transformers("Segformer", "ForSemanticSegmentation")
_transformers("Beit", "ForSemanticSegmentation", **SMALL, num_hidden_layers=4, out_indices=[1, 2, 3, 4])
_transformers("Detr", "ForObjectDetection", **DETR)
_transformers("RTDetr", "ForObjectDetection", decoder_layers=1)
_transformers("DFine", "ForObjectDetection")
_SERIES: dict[str, Any] = {"num_input_channels": 3, "context_length": 64, "shape": (2, 64, 3)}
_transformers("PatchTST", "ForPrediction", d_model=32, ffn_dim=32, **_SERIES)
_transformers("PatchTSMixer", "ForPrediction", norm_mlp="BatchNorm", **_SERIES)
_NETS = "monai.networks.nets"
_WIDTHS = [8, 16, 32, 64]
_network("monai EfficientNetBN-b0", f"{_NETS}.EfficientNetBN", "efficientnet-b0", pretrained=False)
_network("monai HighResNet", f"{_NETS}.HighResNet", 3, 1, 4, shape=(2, 1, 16, 16, 16))
_A: dict[str, Any] = {"spatial_dims": 3, "n_input_channels": 1, "shortcut_type": "A"}
_network("monai ResNet, shortcut A", f"{_NETS}.ResNet", "basic", [2, 2, 2, 2], _WIDTHS, **_A, shape=(2, 1, 32, 32, 32))
_B: dict[str, Any] = {"spatial_dims": 2, "n_input_channels": 3, "shortcut_type": "B"}
_network("monai ResNet, shortcut B", f"{_NETS}.ResNet", "bottleneck", [1, 1, 1, 1], _WIDTHS, **_B)
_network("monai AHNet", f"{_NETS}.AHNet", spatial_dims=3, psp_block_num=2, shape=(2, 1, 32, 32, 32))
_VAE: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "norm": BATCH}
_network("monai SegResNetVAE", f"{_NETS}.SegResNetVAE", (32, 32), **_VAE, shape=(2, 1, 32, 32))
_DYN: dict[str, Any] = {"norm_name": "batch", "res_block": True}
_network("monai DynUNet", f"{_NETS}.DynUNet", 2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], **_DYN)
_network("monai UNet", f"{_NETS}.UNet", 2, 1, 2, (8, 16, 32), (2, 2), num_res_units=2, norm="batch")
_network("monai DenseNet121", f"{_NETS}.DenseNet121", 2, 1, 2)
_network("monai SEResNet50", f"{_NETS}.SEResNet50", spatial_dims=2, in_channels=3, num_classes=4)
_network("monai VNet", f"{_NETS}.VNet", 2, 1, 2)
_network("monai AttentionUnet", f"{_NETS}.AttentionUnet", 2, 1, 2, (8, 16, 32), (2, 2))
_network("kornia EfficientViT-b0", "kornia.models.efficient_vit.backbone.efficientvit_backbone_b0")
_network("kornia HardNet", "kornia.feature.HardNet", False)
_network("kornia TinyViT", "kornia.models.tiny_vit.TinyViT.from_config", "5m", pretrained=False)
_network("kornia ALIKED's block", "kornia.feature.aliked.aliked.ResBlock", 8, 8, shape=(2, 8, 16, 16))
_network("kornia XFeat", "kornia.feature.xfeat.XFeatModel", shape=(2, 1, 64, 64))
_network("kornia DexiNed", "kornia.models.dexined.DexiNed", False)
_ECAPA = "speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN"
_network("speechbrain ECAPA-TDNN", _ECAPA, 80, channels=[64, 64, 64, 64, 192], shape=(2, 40, 80))
_RESNET: dict[str, Any] = {"input_size": 80, "channels": [8, 8, 16, 16], "block_sizes": [1, 1, 1, 1]}
_network("speechbrain ResNet", "speechbrain.lobes.models.ResNet.ResNet", **_RESNET, shape=(2, 40, 80))
_network("speechbrain ContextNet", "speechbrain.lobes.models.ContextNet.ContextNet", (2, 40, 80), 64, shape=(2, 40, 80))
for _name in ("EEGNet", "ShallowFBCSPNet", "Deep4Net", "EEGConformer", "EEGInceptionMI", "TIDNet", "ATCNet", "EEGNeX"):
    _path = f"braindecode.models.{_name}"
    _network(f"braindecode {_name}", _path, 4, 4, n_times=1000, sfreq=250, shape=(2, 4, 1000))
_network("braindecode EEGSimpleConv", "braindecode.models.EEGSimpleConv", 4, 4, sfreq=80, resampling_freq=80)
NETWORKS["braindecode EEGSimpleConv"] = (*NETWORKS["braindecode EEGSimpleConv"][:3], torch.randn(2, 4, 160))
for _name in ("InceptionTime", "ResNet", "XceptionTime", "ResCNN"):
    _network(f"tsai {_name}", f"tsai.models.{_name}.{_name}", 3, 4, shape=(2, 3, 64))
_network("tsai TST", "tsai.models.TST.TST", 3, 4, 64, d_model=32, d_ff=32, shape=(2, 3, 64))
_network("tsai PatchTST", "tsai.models.PatchTST.PatchTST", 3, 4, 64, shape=(2, 3, 64))
for _name in ("yolov5n", "yolov8n", "yolov9t", "yolov10n", "yolo11n", "yolo12n", "yolov8n-ghost"):
    _path = "ultralytics.nn.tasks.DetectionModel"
    _network(f"ultralytics {_name}", _path, f"{_name}.yaml", verbose=False, shape=(2, 3, 64, 64))


def build(path: str, args: tuple[Any, ...], options: dict[str, Any]) -> nn.Module:
    """Call what a path names; of a configuration that stands for the arguments, too."""
    if args and str(args[0]).startswith("transformers."):
        args, options = (_found(args[0])(**options),), {}
    made: nn.Module = _found(path)(*args, **options)
    return made


def _found(path: str) -> Any:
    """Return what a dotted path names, in however deep a module."""
    parts = path.split(".")
    for count in range(len(parts) - 1, 0, -1):
        if _is_module(".".join(parts[:count])):
            return functools.reduce(getattr, parts[count:], importlib.import_module(".".join(parts[:count])))
    raise ModuleNotFoundError(path)


def _is_module(path: str) -> bool:
    try:
        return importlib.util.find_spec(path) is not None
    except (ModuleNotFoundError, AttributeError):  # its parent is a class
        return False


def measure(name: str) -> dict[str, Any]:
    """Plan, convert and prove one network."""
    path, args, options, inputs = NETWORKS[name]
    library, _, model_name = name.partition(" ")
    row: dict[str, Any] = {"library": library, "model": model_name, "version": importlib.metadata.version(library)}
    model = randomise(build(path, args, options)).eval()
    start = time.process_time()
    plan = normfree.plan(model, init="preserve", inputs=inputs)
    row["plan_seconds"] = round(time.process_time() - start, 2)
    actions, kinds = Counter(e.action for e in plan.norms), Counter(total.kind for total in plan.sums)
    row |= {"inputs": plan.looked, "norms": len(plan.norms), "fold": actions["fold"], "affine": actions["affine"]}
    row |= {kind: kinds[kind] for kind in ("residual", "parallel", "merge")}
    row |= {"alphas": len(plan.alphas), "declined": len(plan.declined), "unseen": len(plan.unseen)}
    row["why"] = "; ".join(dict.fromkeys([*plan.declined, *(why for _, why in plan.opaque)]))[:300]
    for init in ("preserve", "skipinit"):
        try:
            converted = normfree.convert(model, init=init, inputs=inputs)  # type: ignore[arg-type]  # one of two
            proofs = normfree.verify(converted, model, inputs).proofs
        except Exception as error:  # whatever a network raises: it stands in the table
            row[init], row["why"] = "error", f"{row['why']}; {init}: {one_line(error)}"[:600]
            continue
        failed = [proof for proof in proofs if proof.passed is False]
        row[init] = "ok" if not failed else f"fails {', '.join(str(proof.number) for proof in failed)}"
        row["why"] = "; ".join(filter(None, [row["why"], *(f"{init} {p.number}: {p.detail}" for p in failed)]))[:600]
        if init == "preserve":
            row["preserve_error"] = "" if proofs[2].figure is None else f"{proofs[2].figure:.1e}"
    return row


def main() -> None:
    """Measure what is asked for and whose library is here, and write the table and its page."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in NETWORKS:
        asked = not sys.argv[1:] or any(part in name for part in sys.argv[1:])
        if not asked or importlib.util.find_spec(name.partition(" ")[0]) is None:
            continue
        try:
            row = measure(name)
        except Exception as error:  # another version of a library builds its networks otherwise
            print(f"{name}: {one_line(error)}"[:400], flush=True)
            continue
        print({key: row.get(key) for key in (*SHOWN, "inputs", "why")}, flush=True)
        with TABLE.open(newline="") as file:
            rows = {f"{known['library']} {known['model']}": dict[str, Any](known) for known in csv.DictReader(file)}
        rows[name] = row
        write([rows[name] for name in NETWORKS if name in rows])


def write(rows: list[dict[str, Any]]) -> None:
    """Write the table and its page."""
    with TABLE.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    versions = ", ".join(dict.fromkeys(f"{row['library']} {row['version']}" for row in rows))
    lines = ["# Other libraries", "", str(__doc__).split("\n\n")[1], "", f"torch {torch.__version__}; {versions}.", ""]
    lines += [f"| {' | '.join(SHOWN)} |", f"|{'---|' * len(SHOWN)}"]
    lines += [f"| {' | '.join(str(row.get(key, '')) for key in SHOWN)} |" for row in rows]
    TABLE.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
