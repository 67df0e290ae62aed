"""Fine-tune any timm model without its BatchNorm, or with it, on one machine or many: copy this file and change it.

Processes, machines, DDP or FSDP2 and mixed precision are settings of `accelerate launch` and `accelerate config`, and
nothing here. `--batch` is what all processes see in one pass, and images are drawn and changed by seed and epoch: the
same command does the same in any number of processes.

Run: python examples/finetune_timm.py --pretrained --images FOLDER --out runs/mine [--resume]
     accelerate launch --num_processes 2 --mixed_precision bf16 examples/finetune_timm.py --accumulate 4 \
         --model resnet50.a1_in1k --pretrained --images FOLDER --out runs/mine

A run that is killed loses the epoch that it was in: `--resume` goes on, to the same result.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import random
import shutil
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from timm.data import create_transform, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import FakeData, ImageFolder

import normfree


class Varied(Dataset[tuple[Tensor, int]]):
    """Some images of a dataset, each changed at random by seed, `epoch` and image alone, in whatever process."""

    def __init__(self, images: Any, indices: list[int], transform: Any, seed: int) -> None:
        self.images, self.indices, self.transform, self.seed, self.epoch = images, indices, transform, seed, 0

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[self.indices[index]]
        seed = int(np.random.SeedSequence((self.seed, self.epoch, index)).generate_state(1)[0])
        with torch.random.fork_rng(devices=()):  # dropout draws from torch's generator too
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)
            return self.transform(image), label


def network(options: Namespace, classes: int) -> nn.Module:
    """Build the model with its weights and a new head."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would tell of every retry
    try:
        model = timm.create_model(options.model, options.pretrained, drop_rate=options.drop)
    except (OSError, RuntimeError) as error:  # no connection, or no such model
        raise SystemExit(f"{options.model} cannot be had: {str(error).strip().splitlines()[0]}") from None
    if options.checkpoint is not None:
        state = timm.models.load_state_dict(options.checkpoint, weights_only=True)
        model.reset_classifier(len(state[f"{model.pretrained_cfg['classifier']}.weight"]))  # its own classes first
        model.load_state_dict(state)
    model.reset_classifier(classes)
    return model


def loaders(options: Namespace, images: Any, model: nn.Module, accelerator: Accelerator) -> list[DataLoader[Any]]:
    """Return training, validation and test images through timm's transforms, as the model's own settings say."""
    config = resolve_data_config({"input_size": (3, options.size, options.size)} if options.size else {}, model=model)
    varied = create_transform(**config, is_training=True, scale=(0.5, 1), auto_augment=options.augment)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    parts = order.tensor_split((round(0.6 * len(images)), round(0.8 * len(images))))
    steps = (varied, create_transform(**config), create_transform(**config))
    sets = [Varied(images, part.tolist(), step, options.seed) for part, step in zip(parts, steps, strict=True)]
    if len(sets[0]) < options.batch:
        raise SystemExit(f"{len(sets[0])} images to train on are no batch of {options.batch}: take a smaller --batch")
    each = {"num_workers": options.workers, "pin_memory": accelerator.device.type == "cuda"}
    train = DataLoader(sets[0], options.batch, shuffle=True, drop_last=True, **each)
    return [train, *(DataLoader(part, 64 * accelerator.num_processes, **each) for part in sets[1:])]


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, loader: DataLoader[Any]) -> list[float]:
    """Return mean loss and accuracy in eval mode, every image counted once."""
    model, seen = model.eval(), []
    for x, y in loader:
        logits = model(x).float()
        each = torch.stack([F.cross_entropy(logits, y, reduction="none"), (logits.argmax(1) == y).float()], 1)
        seen.append(accelerator.gather_for_metrics(each))
    return torch.cat(seen).cpu().double().mean(0).tolist()


class Run:
    """A training run: what Accelerate made of model, optimizer and images, and the rows of its log."""

    def __init__(self, options: Namespace, accelerator: Accelerator, model: nn.Module, sets: list[Any]) -> None:
        self.options, self.accelerator, self.rows = options, accelerator, []
        if not options.batch_norm:
            normfree.watch(model)  # warns of a learning rate that is too high, before the loss shows it
        optimizer = create_optimizer_v2(model, options.opt, options.lr, options.weight_decay, momentum=0.9)
        prepared = accelerator.prepare(model, optimizer, *sets)
        self.model, self.optimizer, self.train, self.validation, self.test = prepared
        self.steps = math.ceil(len(self.train) / options.accumulate)  # an epoch; the last one may be incomplete
        warm = round(options.warmup * options.epochs * self.steps)
        times = {"t_initial": options.epochs * self.steps + 1 - warm, "warmup_t": warm, "warmup_prefix": True}
        self.schedule = CosineLRScheduler(optimizer, **times, t_in_epochs=False)

    def epoch(self, number: int) -> dict[str, float]:
        """Train an epoch and look at the validation images."""
        accelerator = self.accelerator
        set_seed(self.options.seed + 1 + number, device_specific=True)
        self.train.set_epoch(number)  # the order of the images, and how each of them is changed
        self.train.dataset.epoch = number
        self.model.train()
        step, seen = number * self.steps, []
        for x, y in self.train:
            with accelerator.accumulate(self.model):
                logits = self.model(x)
                loss = F.cross_entropy(logits, y)
                share = (logits.argmax(1) == y).float().mean()
                seen.append(accelerator.gather(torch.stack([loss.detach().float(), share])[None]).mean(0))
                if not seen[-1].isfinite().all():  # in every process at once, or the others would wait for this one
                    raise SystemExit(f"epoch {number + 1}, step {step + 1}: the loss is not finite; use a smaller --lr")
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    step += 1
                    self.schedule.step_update(step)
                    accelerator.clip_grad_norm_(self.model.parameters(), self.options.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
        figures = torch.stack(seen).cpu().double().mean(0).tolist() + evaluate(accelerator, self.model, self.validation)
        names = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")
        return {"epoch": number + 1, **{name: round(x, 6) for name, x in zip(names, figures, strict=True)}}

    def go(self) -> None:
        """Train the epochs that are not done yet, with a checkpoint after each."""
        if done := checkpoints(self.options.out):
            self.accelerator.load_state(str(done[-1]))
            self.rows = json.loads((done[-1] / "log.json").read_text())
        while len(self.rows) < self.options.epochs:
            self.rows.append(self.epoch(len(self.rows)))
            save_checkpoint(self.accelerator, self.options.out, self.rows)
            self.accelerator.print("  ".join(f"{key} {value:g}" for key, value in self.rows[-1].items()))


def checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints, the newest last."""
    return sorted(folder.glob("epoch-*"))


def save_checkpoint(accelerator: Accelerator, folder: Path, rows: list[dict[str, float]]) -> None:
    """Write a checkpoint beside the previous one, which goes only once this one is whole and has its name."""
    part = folder / "unfinished"
    accelerator.save_state(str(part))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (part / "log.json").write_text(json.dumps(rows, indent=2))
        part.replace(folder / f"epoch-{len(rows):05d}")
        for old in checkpoints(folder)[:-1]:
            shutil.rmtree(old)


def settle(options: Namespace, accelerator: Accelerator) -> None:
    """Refuse to mix two runs in one folder; note what this one was asked for."""
    if int(os.environ.get("WORLD_SIZE", "1")) != accelerator.num_processes:
        raise SystemExit("launched as several processes, of which Accelerate sees one: without a GPU, say --cpu")
    path, begun = options.out / "settings.json", checkpoints(options.out)
    asked = {key: str(value) for key, value in vars(options).items() if key not in ("out", "resume", "workers", "cpu")}
    known = json.loads(path.read_text()) if begun else asked
    if begun and not options.resume:
        raise SystemExit(f"{options.out} holds checkpoints: say --resume to go on with them, or name another --out")
    if other := [f"{key} was {known.get(key)}, now {asked[key]}" for key in asked if known.get(key) != asked[key]]:
        raise SystemExit(f"{options.out} holds a run with other settings: {'; '.join(other)}")
    if accelerator.is_main_process and not begun:
        options.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asked, indent=2))
    accelerator.wait_for_everyone()


def parse() -> Namespace:
    """Read the command line."""
    made = ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--model", default="resnet50", help="a name that timm knows")
    made.add_argument("--pretrained", action="store_true", help="timm's weights")
    made.add_argument("--checkpoint", type=Path, help="weights of this model, whatever its classes")
    made.add_argument("--batch-norm", action="store_true", help="train the original")
    made.add_argument("--images", type=Path, help="a folder with one folder of images a class; noise without it")
    made.add_argument("--size", type=int, help="pixels of a side; the model's own by default")
    made.add_argument("--augment", help="timm's auto-augment, such as rand-m9-mstd0.5")
    made.add_argument("--epochs", type=int, default=10)
    made.add_argument("--batch", type=int, default=32, help="images of one pass, over all processes")
    made.add_argument("--accumulate", type=int, default=1, help="passes a step of the optimizer")
    made.add_argument("--opt", default="sgd", help="an optimizer of timm's; sgd has Nesterov's momentum")
    made.add_argument("--lr", type=float, default=2.0**-6)
    made.add_argument("--warmup", type=float, default=0.1, help="share of the steps")
    made.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient; inf for none")
    made.add_argument("--weight-decay", type=float, default=5e-4)
    made.add_argument("--drop", type=float, default=0.0, help="dropout before the classifier")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--workers", type=int, default=0, help="processes that read images, a process that trains")
    made.add_argument("--cpu", action="store_true", help="of several processes too: accelerate launch --multi_gpu")
    made.add_argument("--out", type=Path, required=True, help="folder for checkpoints, report and model")
    made.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out, if any")
    return made.parse_args()


def main() -> None:
    """Build, convert, train, test, and write the model."""
    options = parse()
    config = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=options.seed)
    accelerator = Accelerator(cpu=options.cpu, dataloader_config=config, gradient_accumulation_steps=options.accumulate)
    settle(options, accelerator)
    set_seed(options.seed)
    try:
        images = ImageFolder(str(options.images)) if options.images else FakeData(96, (3, 64, 64), 2)
    except FileNotFoundError as error:
        raise SystemExit(f"--images {options.images}: {str(error).splitlines()[0]}") from None
    if options.images:
        accelerator.print(f"{len(images)} images of {len(images.classes)} classes: {', '.join(images.classes[:10])}")
        if {"train", "test", "val", "valid"} >= {*images.classes}:
            raise SystemExit(f"--images {options.images}: these are parts, not classes; name one, it is split here")
    classes = len(images.classes) if options.images else 2
    model = network(options, classes)
    sets = loaders(options, images, model, accelerator)
    if not options.batch_norm:  # before the optimizer, and before Accelerate wraps the model
        model = normfree.convert(model, init="preserve")
        few = torch.stack([sets[0].dataset[i][0] for i in range(min(32, len(sets[0].dataset)))])
        model = normfree.calibrate(model, few)
    whole = copy.deepcopy(model)
    run = Run(options, accelerator, model, sets)
    run.go()
    loss, accuracy = evaluate(accelerator, run.model, run.test)
    state = accelerator.get_state_dict(run.model)
    if accelerator.is_main_process:
        whole.load_state_dict(state)
        path = options.out / "model.safetensors"
        if options.batch_norm:
            safetensors.torch.save_model(whole, str(path))
        else:
            normfree.save(whole, path, source=f"timm:{options.model}", num_classes=classes, overwrite=True)
        found = {"processes": accelerator.num_processes, "test_loss": loss, "test_accuracy": accuracy}
        (options.out / "report.json").write_text(json.dumps({**found, "epochs": run.rows}, indent=2))
        print(f"{accuracy:.1%} of the test images; the model is in {path}, and report.json is beside it")
    accelerator.end_training()


if __name__ == "__main__":
    main()
