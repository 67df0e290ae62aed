"""Fine-tuning does the same in any number of processes and after any kill, and a loss that is not finite ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import finetune_timm
import pytest
import safetensors.torch
import timm
import torch
from marks import broad
from PIL import Image
from scripts import EXAMPLES, run_here
from torchvision.transforms.v2 import functional as tv

import normfree

SHORT = ("--model", "test_resnet", "--size", 32, "--epochs", 3, "--batch", 16, "--lr", 0.25)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 54 pictures in three classes, each of a colour of its own."""
    folder = tmp_path_factory.mktemp("images")
    draw = torch.Generator().manual_seed(0)
    for i in range(54):
        path = folder / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = torch.randint(0, 60, (40, 40, 3), dtype=torch.uint8, generator=draw)
        pixels[:, :, i % 3] += 150
        Image.fromarray(pixels.numpy()).save(path)
    return folder


def command(*arguments: object) -> list[str]:
    return [str(EXAMPLES / "finetune_timm.py"), *map(str, arguments)]


def finetune(out: Path, images: Path, *arguments: object) -> Path:
    """Run the example in this process."""
    run_here("finetune_timm.py", *SHORT, "--images", images, "--out", out, *arguments)
    return out


def log(out: Path) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = json.loads((out / "report.json").read_text())["epochs"]
    return rows


def numbers(out: Path) -> list[list[float]]:
    return [list(row.values()) for row in log(out)]


def same(one: Path, other: Path) -> bool:
    first, second = (safetensors.torch.load_file(out / "model.safetensors") for out in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


VARIED = ("--drop", 0.2, "--augment", "rand-m9")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A run that nobody kills, with all that draws at random."""
    return finetune(tmp_path_factory.mktemp("runs") / "whole", images, *VARIED)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    return finetune(tmp_path_factory.mktemp("runs") / "plain", images)


def test_it_learns_and_says_what_came_of_it(plain: Path) -> None:
    rows = log(plain)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert json.loads((plain / "report.json").read_text())["test_accuracy"] > 0.9
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert [path.name for path in finetune_timm.checkpoints(plain)] == ["epoch-00003"]


def test_the_model_is_what_normfree_loads(plain: Path, images: Path) -> None:
    model = normfree.load(plain / "model.safetensors").eval()
    assert type(model).__name__ == "ResNet"
    assert model.num_classes == 3
    paths = sorted(images.glob("class2/*.png"))
    x = torch.stack([tv.resize(tv.to_image(Image.open(path)), [32, 32]).float() / 127.5 - 1 for path in paths])
    assert (model(x).argmax(1) == 2).float().mean() > 0.9


KILLED = """
import os, signal, sys
import finetune_timm
from accelerate import Accelerator

calls = 0
def dies(function, after):
    def called(self, *arguments, **named):
        global calls
        calls += 1
        result = function(self, *arguments, **named) if calls <= after else None
        if calls > after:
            part = arguments[0] if arguments and isinstance(arguments[0], str) else None
            if part:
                os.makedirs(part)
                open(os.path.join(part, "model.safetensors"), "wb").write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return called

if sys.argv.pop(1) == "while writing":
    Accelerator.save_state = dies(Accelerator.save_state, 1)
else:
    Accelerator.clip_grad_norm_ = dies(Accelerator.clip_grad_norm_, 3)
finetune_timm.main()
"""


@pytest.mark.parametrize("moment", ["while writing", *broad("within an epoch")])
def test_killed_and_resumed_it_ends_where_it_would_have(moment: str, whole: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    arguments = command(*SHORT, "--images", images, "--out", out, *VARIED)[1:]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, moment, *arguments],
        cwd=EXAMPLES,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [path.name for path in finetune_timm.checkpoints(out)] == ["epoch-00001"]
    assert (out / "unfinished").exists() == (moment == "while writing")
    finetune(out, images, *VARIED, "--resume")
    assert log(out) == log(whole)
    assert same(out, whole)


def test_resuming_what_never_began_begins(plain: Path, images: Path, tmp_path: Path) -> None:
    out = finetune(tmp_path / "new", images, "--resume")
    assert log(out) == log(plain)
    assert same(out, plain)
    (out / "report.json").unlink()  # as if it had been killed after its last checkpoint
    finetune(out, images, "--resume")
    assert log(out) == log(plain)


def test_two_runs_in_one_folder_are_refused(plain: Path, images: Path) -> None:
    with pytest.raises(SystemExit, match="holds checkpoints: say --resume to go on with them, or name another --out"):
        finetune(plain, images)
    with pytest.raises(SystemExit, match="holds a run with other settings: lr was 0.25, now 0.5"):
        finetune(plain, images, "--resume", "--lr", 0.5)


def test_a_folder_of_parts_is_no_folder_of_classes(images: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / "parts" / part).mkdir(parents=True)
        (tmp_path / "parts" / part / "0.png").write_bytes((images / "class0" / "0.png").read_bytes())
    with pytest.raises(SystemExit, match="these are parts, not classes; name one"):
        finetune(tmp_path / "out", tmp_path / "parts")


def launch(*arguments: object) -> subprocess.CompletedProcess[str]:
    of_two = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    quiet = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    whole = [sys.executable, "-m", "accelerate.commands.launch", *of_two, *quiet, *command(*arguments)]
    return subprocess.run(whole, capture_output=True, text=True, check=False)


@pytest.mark.broad
def test_two_processes_do_what_one_does(plain: Path, images: Path, tmp_path: Path) -> None:
    done = launch(*SHORT, "--images", images, "--out", tmp_path, "--cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "report.json").read_text())["processes"] == 2
    for mine, theirs in zip(numbers(tmp_path), numbers(plain), strict=True):
        assert mine == pytest.approx(theirs, abs=2e-5)


def test_processes_that_do_not_see_each_other_are_refused(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="launched as several processes, of which Accelerate sees one"):
        finetune(tmp_path, images)


def test_accumulated_batches_are_one_large_batch(plain: Path, images: Path, tmp_path: Path) -> None:
    parts = numbers(finetune(tmp_path / "parts", images, "--batch", 4, "--accumulate", 4))
    for mine, theirs in zip(parts, numbers(plain), strict=True):
        assert mine == pytest.approx(theirs, abs=2e-5)
    with_norms = [
        numbers(finetune(tmp_path / f"bn{size}", images, "--batch-norm", "--batch", size, "--accumulate", 16 // size))
        for size in (16, 4)
    ]
    assert abs(with_norms[0][0][1] - with_norms[1][0][1]) > 1e-3, "batch norm is not"


def test_precision_is_a_setting_of_accelerate(
    plain: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    out = finetune(tmp_path / "out", images)
    first, last = (pytest.approx(numbers(plain)[i][1], abs=0.05) for i in (0, -1))
    assert [numbers(out)[i][1] for i in (0, -1)] == [first, last]
    assert numbers(out)[0][1] != numbers(plain)[0][1]
    assert {value.dtype for value in safetensors.torch.load_file(out / "model.safetensors").values()} == {torch.float32}


def test_the_original_is_trained_on_request_from_a_checkpoint_with_other_classes(images: Path, tmp_path: Path) -> None:
    checkpoint, out = tmp_path / "weights.pth", tmp_path / "out"
    original = timm.create_model("test_efficientnet", num_classes=7)
    torch.save(original.state_dict(), checkpoint)
    arguments = ("--checkpoint", checkpoint, "--opt", "adamw", "--lr", 0.001, "--epochs", 1)
    finetune(out, images, "--model", "test_efficientnet", "--batch-norm", *arguments)
    state = safetensors.torch.load_file(out / "model.safetensors")
    assert len(state["classifier.weight"]) == 3
    moved = [
        key
        for key, value in original.state_dict().items()
        if value.is_floating_point() and "classifier" not in key and not torch.equal(state[key], value)
    ]
    assert any("running" in key for key in moved)
    assert any(key.endswith("conv_pw.weight") for key in moved)


def test_what_cannot_be_converted_is_said(images: Path, tmp_path: Path) -> None:
    with pytest.raises(normfree.errors.NoNormError, match="holds no batch normalisation"):
        finetune(tmp_path, images, "--model", "test_convnext")


def test_a_loss_that_is_not_finite_ends_it(images: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="epoch 1, step 2: the loss is not finite; use a smaller --lr"):
        finetune(tmp_path, images, "--lr", 1e30, "--clip", "inf", "--warmup", 0)


def test_noise_will_do_to_try_it(tmp_path: Path) -> None:
    run_here("finetune_timm.py", *SHORT, "--epochs", 1, "--out", tmp_path)
    assert normfree.load(tmp_path / "model.safetensors").num_classes == 2


def test_draws_depend_on_seed_epoch_and_image_alone() -> None:
    def draw(_image: Any) -> torch.Tensor:
        return torch.rand(3)

    pictures = [(None, 0)] * 4
    one, other = (finetune_timm.Varied(pictures, [0, 1, 2, 3], draw, seed) for seed in (0, 1))
    before = torch.get_rng_state()
    first = [one[i][0] for i in (0, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one[1][0], first[1])
    drawn = [*first, other[0][0]]
    one.epoch = 1
    drawn.append(one[0][0])
    assert len({tuple(x.tolist()) for x in drawn}) == 5


def test_images_and_weights_that_are_not_there_are_one_line(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    for folder in ("nowhere", tmp_path / "empty"):
        with pytest.raises(SystemExit, match=f"^--images {folder}: .*{Path(folder).name}[^\n]*$"):
            run_here("finetune_timm.py", *SHORT, "--images", folder, "--out", tmp_path / "out")
        with pytest.raises(SystemExit, match=f"^--images {folder}: "):
            run_here("trainable_depth.py", "--images", folder, "--csv", tmp_path / "table.csv")
    with pytest.raises(SystemExit, match=r"^no_such_model cannot be had: Unknown model \(no_such_model\)$"):
        run_here("finetune_timm.py", "--model", "no_such_model", "--images", images, "--out", tmp_path / "out2")

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no connection\nand more")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(SystemExit, match="^test_resnet cannot be had: no connection$"):
        run_here("finetune_timm.py", *SHORT, "--images", images, "--out", tmp_path / "out3", "--pretrained")
