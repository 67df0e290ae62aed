"""Fine-tune a ResNet of transformers without its BatchNorm, at a batch of two, with Hugging Face's Trainer.

Take the rates of the original: the conversion is one line, before Trainer sees the model, and the head is on by then.
The ResNet learns the digits 0 to 5 with its norms first, in place of weights from the Hub, and then 6 to 9 without.
At the end it gets its norms back, so that whatever reads a ResNet reads the folder.

Run: python examples/finetune_transformers.py [--out FOLDER]
"""

from __future__ import annotations

import tempfile
from argparse import ArgumentParser

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, set_seed

import normfree

Images = list[dict[str, torch.Tensor]]
"""As Trainer wants them: a dictionary an image."""


def digits(first: int, last: int, train: int) -> tuple[Images, Images]:
    """Return scikit-learn's handwritten digits from `first` to `last` at 32 px: so many to train on, and the rest."""
    pixels, classes = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    x = F.interpolate(x, scale_factor=4, mode="bilinear")
    chosen = [i for i in torch.randperm(len(x)).tolist() if first <= classes[i] <= last]
    images = [{"pixel_values": x[i], "labels": torch.tensor(classes[i] - first)} for i in chosen]
    return images[:train], images[train:]


def fit(model: ResNetForImageClassification, train: Images, test: Images, lr: float, batch: int, out: str) -> float:
    """Train for an epoch as transformers does it and return the test accuracy."""
    arguments = TrainingArguments(
        out,
        learning_rate=lr,
        per_device_train_batch_size=batch,
        num_train_epochs=1,
        max_grad_norm=0.0,  # Trainer clips gradients if it is not told otherwise; no network here needs it
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,  # torch warns of it where there is no accelerator
    )
    trainer = Trainer(model, arguments, train_dataset=train)
    trainer.train()
    logits = torch.from_numpy(trainer.predict(test).predictions)
    return (logits.argmax(1) == torch.stack([image["labels"] for image in test])).float().mean().item()


def main() -> None:
    """Train with norms, convert, train without, and put the norms back."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch-norm", action="store_true", help="fine-tune the original")
    parser.add_argument("--out", help="folder for the ResNet; a temporary one by default")
    options = parser.parse_args()
    out = options.out or tempfile.mkdtemp()
    set_seed(0)

    shape = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"}
    original = ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=6, **shape))
    print(f"0 to 5, with norms: {fit(original, *digits(0, 5, 800), 2e-3, 16, out):.1%}")
    original.save_pretrained(out)

    model = ResNetForImageClassification.from_pretrained(out, num_labels=4, ignore_mismatched_sizes=True)
    if not options.batch_norm:
        model = normfree.convert(model, init="preserve")
        normfree.watch(model)  # warns in the first steps if the learning rate is too high
    train, test = digits(6, 9, 240)
    print(f"6 to 9: {fit(model, train, test, options.lr, 2, out):.1%}")
    if not options.batch_norm:
        model = normfree.restore(model)
    model.save_pretrained(out)


if __name__ == "__main__":
    main()
