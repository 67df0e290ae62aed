"""What a run that may be killed at any moment leaves behind, and what it finds again when it goes on."""

from __future__ import annotations

import csv
import json
import os
import shutil
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from normfree.files import replacing

WHERE = ("out", "resume", "workers", "cpu")  # options that change nothing about the result


@dataclass
class Progress:
    """The epochs that are done, as rows of the CSV; a part of every checkpoint."""

    rows: list[dict[str, float]] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint."""
        self.rows = state["rows"]

    def write(self, folder: Path, accelerator: Accelerator) -> None:
        """Write the CSV, from one process."""
        if not accelerator.is_main_process:
            return
        with replacing(folder / "log.csv") as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.rows[0])
            writer.writeheader()
            writer.writerows(self.rows)


def checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints, the newest last."""
    return sorted(folder.glob("epoch-*"))


def save_checkpoint(accelerator: Accelerator, folder: Path, epoch: int) -> None:
    """Write a checkpoint beside the previous one, which goes only once this one is whole and has its name."""
    part = folder / "unfinished"
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(part))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        part.replace(folder / f"epoch-{epoch:05d}")
        for old in checkpoints(folder)[:-1]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def settle(options: Namespace, accelerator: Accelerator) -> None:
    """Refuse to mix two runs in one folder; note what this one was asked for."""
    if int(os.environ.get("WORLD_SIZE", "1")) != accelerator.num_processes:
        raise SystemExit("launched as several processes, of which Accelerate sees one: without a GPU, say --cpu")
    path = options.out / "settings.json"
    asked = {key: value for key, value in vars(options).items() if key not in WHERE}
    asked |= {"accumulate": accelerator.gradient_accumulation_steps, "mixed_precision": accelerator.mixed_precision}
    asked = json.loads(json.dumps(asked, default=str))
    if checkpoints(options.out) and not options.resume:
        raise SystemExit(f"{options.out} holds checkpoints: say --resume to go on with them, or name another --out")
    known = json.loads(path.read_text()) if checkpoints(options.out) else asked
    other = [
        f"{key} was {known.get(key)}, now {asked.get(key)}" for key in known | asked if known.get(key) != asked.get(key)
    ]
    if other:
        raise SystemExit(f"{options.out} holds a run with other settings: {'; '.join(other)}")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        options.out.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(asked, indent=2))
