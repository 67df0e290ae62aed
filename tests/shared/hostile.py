"""Files as an attacker or a broken disk makes them, drawn from a seed; nothing of them is kept.

Run: PYTHONPATH=examples/experiments python tests/shared/hostile.py 1000 [seed [timm:NAME]]

It feeds that many to the package, and prints what came of it.
"""

from __future__ import annotations

import collections
import io
import json
import pickle
import random
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from support_table import randomise
from typer.testing import CliRunner

import normfree
from normfree.cli import app

NAME = "timm:test_resnet" if len(sys.argv) < 4 or __name__ != "__main__" else sys.argv[3]
CLASSES = 3


class Trap:
    """Would create a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


class Victim:
    """Good files to start from, and the trap that no bad one may spring."""

    def __init__(self, folder: Path) -> None:
        model = randomise(timm.create_model(NAME.removeprefix("timm:"), num_classes=CLASSES))
        self.state = {key: value.clone() for key, value in model.state_dict().items()}
        self.checkpoint = safetensors.torch.save(self.state)
        buffer = io.BytesIO()
        torch.save({"state_dict": self.state}, buffer)
        self.pickled = buffer.getvalue()
        normfree.save(normfree.convert(model), folder / "good.safetensors", source=NAME, num_classes=CLASSES)
        self.converted = (folder / "good.safetensors").read_bytes()
        self.trap = folder / "sprung"
        self.folder = folder


Made = tuple[str, bytes]
"""An ending and the content."""


def _header(data: bytes) -> tuple[Any, bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _joined(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def truncated(victim: Victim, rng: random.Random) -> Made:
    ending, data = rng.choice([(".safetensors", victim.checkpoint), (".pth", victim.pickled), ("nf", victim.converted)])
    return ending, data[: rng.randrange(len(data))]


def flipped(victim: Victim, rng: random.Random) -> Made:
    """Bits of the header more often than of the values."""
    ending, data = rng.choice([(".safetensors", victim.checkpoint), (".pth", victim.pickled), ("nf", victim.converted)])
    changed = bytearray(data)
    for _ in range(rng.choice([1, 3, 30])):
        changed[rng.randrange(rng.choice([16, 4000, len(data)]))] ^= 1 << rng.randrange(8)
    return ending, bytes(changed)


def lying_header(victim: Victim, rng: random.Random) -> Made:
    """Sizes, offsets, shapes and types that are not so."""
    ending, data = rng.choice([(".safetensors", victim.checkpoint), ("nf", victim.converted)])
    header, body = _header(data)
    key = rng.choice([key for key in header if key != "__metadata__"])
    start, end = header[key]["data_offsets"]
    huge = rng.choice([2**31, 2**40, 2**63, 2**64, -1, 10**30])
    change = rng.choice(
        [
            {"data_offsets": [start, end + rng.choice([1, 4, 1000, huge])]},
            {"data_offsets": [end, start]},
            {"data_offsets": [huge, huge + end - start]},
            {"shape": [huge]},
            {"shape": [huge, huge, huge]},
            {"shape": [0, huge]},
            {"dtype": rng.choice(["I64", "F64", "F16", "BOOL", "NONE", ""])},
            {"shape": None},
        ]
    )
    header[key] = header[key] | change
    return ending, _joined(header, body)


def lying_length(victim: Victim, rng: random.Random) -> Made:
    data = rng.choice([victim.checkpoint, victim.converted])
    size = rng.choice([0, 1, 2**20, 2**32, 2**63, 2**64 - 1, len(data), len(data) - 8])
    return ".safetensors", struct.pack("<Q", size) + data[8:]


def odd_keys(victim: Victim, rng: random.Random) -> Made:
    """Duplicates, paths, control characters, very long names, prefixes that collide."""
    header, body = _header(victim.checkpoint)
    key = rng.choice(list(header))
    odd = rng.choice(
        ["../../etc/passwd", "/etc/passwd", "\x1b[2J", "a" * 10**5, "", "module." + key, "con\0v", "\ud800"]
    )
    text = json.dumps(header)
    if rng.random() < 0.5:
        text = text[:-1] + "," + json.dumps({odd: header[key]})[1:-1] + "}"
    else:
        text = text.replace(json.dumps(key), json.dumps(odd), 1)
    if rng.random() < 0.3:
        text = text[:-1] + "," + json.dumps({key: header[key]})[1:-1] + "}"
    return ".safetensors", _joined(text.encode(), body)


def odd_values(victim: Victim, rng: random.Random) -> Made:
    """Values that are not finite, negative variances, other types and shapes."""
    state = dict(victim.state)
    key = rng.choice([key for key in state if "num_batches" not in key])
    value = state[key].clone()
    what = rng.randrange(6)
    if what == 0:
        value.view(-1)[rng.randrange(value.numel())] = rng.choice([float("nan"), float("inf"), -1e30])
    elif what == 1:
        value = value.to(rng.choice([torch.int8, torch.int64, torch.bool, torch.complex64]))
    elif what == 2:
        value = value.reshape(-1)[: rng.randrange(value.numel())]
    elif what == 3:
        key = rng.choice([key for key in state if key.endswith("running_var")])
        value = -state[key]
    elif what == 4:
        value = value.expand(3, *value.shape)
    else:
        value = value.to(torch.float16)
    state[key] = value
    if rng.random() < 0.5:
        return ".safetensors", safetensors.torch.save({key: value.contiguous() for key, value in state.items()})
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return ".pth", buffer.getvalue()


def evil_pickle(victim: Victim, rng: random.Random) -> Made:
    """Pickles that call functions, bare, inside of an archive, or beside real weights."""
    trap = Trap(victim.trap)
    buffer = io.BytesIO()
    what = rng.randrange(4)
    if what == 0:
        pickle.dump(rng.choice([trap, {"state_dict": trap}, [trap]]), buffer, protocol=rng.choice([0, 2, 4]))
    elif what == 1:
        torch.save({"state_dict": victim.state, "epoch": trap}, buffer)
    elif what == 2:
        torch.save({**victim.state, "fc.bias": trap}, buffer, _use_new_zipfile_serialization=False)
    else:
        text = b"\x80\x02c" + rng.choice([b"os\nsystem\n", b"builtins\neval\n", b"torch\nload\n", b"subprocess\nrun\n"])
        text += b"X" + struct.pack("<I", 20) + b"touch sprung; ######" + b"\x85R."
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", text)
            archive.writestr("archive/version", "3")
    return rng.choice([".pth", ".pt", ".bin", ".tar"]), buffer.getvalue()


def huge_pickle(victim: Victim, rng: random.Random) -> Made:
    """Zip bombs, entries that overlap, and tensors that are large only by their strides or not plain."""
    buffer = io.BytesIO()
    what = rng.randrange(4)
    if what < 2:
        with zipfile.ZipFile(io.BytesIO(victim.pickled)) as good, zipfile.ZipFile(buffer, "w") as archive:
            bomb = rng.choice(good.namelist())
            for name in good.namelist():
                kind = zipfile.ZIP_DEFLATED if name == bomb else zipfile.ZIP_STORED
                archive.writestr(name, bytes(2**25) if name == bomb else good.read(name), kind)
        return ".pth", buffer.getvalue()
    tensor = rng.choice(
        [
            torch.zeros(1).expand(2**20, 2**20),
            torch.sparse_coo_tensor([[0]], [1.0], (2**40,), check_invariants=True),
            torch.empty(2**30, device="meta"),
            torch.zeros(0),
        ]
    )
    torch.save({**victim.state, rng.choice(list(victim.state)): tensor}, buffer)
    return ".pth", buffer.getvalue()


def absurd_plan(victim: Victim, rng: random.Random) -> Made:
    """Metadata whose plan names other modules, or holds values that make no sense."""
    header, body = _header(victim.converted)
    raw = json.loads(header["__metadata__"]["normfree"])
    spot = rng.choice(["plan", "norm", "alpha", "sum", "header", "reference", "kept", "text"])
    odd = rng.choice(
        [None, -1, 2**40, 1e308, "layer1", "../x", "__class__", [], {}, [[]] * 9, True, "eval(1)", "a" * 10**5]
    )
    if spot == "text":
        deep = "[" * 10**5
        header["__metadata__"]["normfree"] = rng.choice(["", "{", "null", deep, '{"plan": ' + deep, "[1]", "NaN"])
        return "nf", _joined(header, body)
    if spot == "kept":
        header["__metadata__"]["normfree.norms"] = rng.choice(["", "x", "AAAA", "A" * 400])
        return "nf", _joined(header, body)
    holders = {
        "plan": raw["plan"],
        "norm": rng.choice(raw["plan"]["norms"]),
        "sum": rng.choice(raw["plan"]["sums"]),
        "header": raw,
        "reference": raw,
    }
    if spot == "alpha":
        chosen = rng.choice([total for total in raw["plan"]["sums"] if total["alphas"]])["alphas"][0]
        chosen[rng.choice(["path", "place", "channels", "addition", "operand"])] = rng.choice([odd, [0, 2**19], [5, 2]])
    elif spot == "reference":
        huge = {"shape": [2**20, 2**20], "dtype": rng.choice(["float32", "load"])}
        raw["reference"] = huge | {"first": [0.0], "values": [1.0], "scale": 1, "rounding": 0}
    else:
        holder = holders[spot]
        holder[rng.choice([*holder, "other"])] = odd
    if rng.random() < 0.2:
        raw["source"], raw["num_classes"] = rng.choice([(NAME, 10**9), ("timm:regnety_2560", None), ("os:system", 3)])
    header["__metadata__"]["normfree"] = json.dumps(raw)
    return "nf", _joined(header, body)


MUTATIONS: tuple[Callable[[Victim, random.Random], Made], ...] = (
    truncated,
    flipped,
    lying_header,
    lying_length,
    odd_keys,
    odd_values,
    evil_pickle,
    huge_pickle,
    absurd_plan,
)


def feed(victim: Victim, number: int, seed: int, ready: Callable[[], None] = lambda: None) -> tuple[str, int, str]:
    """Make one file, hand it to the command line, and hold that to what it promises; return what happened."""
    rng = random.Random(f"{seed}/{number}")  # noqa: S311  # the same files again, not secrets
    mutation = MUTATIONS[number % len(MUTATIONS)]
    ending, data = mutation(victim, rng)
    folder = victim.folder / "work"
    folder.mkdir(exist_ok=True)
    out = folder / "out.safetensors"
    path = folder / ("in.safetensors" if ending == "nf" else f"in{ending}")
    path.write_bytes(data)
    del data
    if ending == "nf":
        command: list[object] = [rng.choice(["fuse", "restore"]), path, "-o", out]
    else:
        command = ["convert", NAME, "--num-classes", CLASSES, "--checkpoint", path, "-o", out, "--no-verify"]
    ready()
    done = CliRunner().invoke(app, list(map(str, command)))
    said = f"{mutation.__name__} {number} (seed {seed}): {done.output[-500:]}"
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise AssertionError(f"{said} {done.exception!r}") from done.exception
    if done.exit_code not in (0, 1, 2) or (done.exit_code and "error: " not in done.stderr):
        raise AssertionError(f"exit code {done.exit_code} without a message: {said}")
    if victim.trap.exists() or Path("sprung").exists():
        raise AssertionError(f"code was executed: {said}")
    left = sorted(item.name for item in folder.iterdir())
    if left != sorted([path.name, *(["out.safetensors"] if done.exit_code == 0 else [])]):
        raise AssertionError(f"left {left}: {said}")
    if done.exit_code == 0:
        safetensors.torch.load_file(out)
        out.unlink()
    path.unlink()
    return mutation.__name__, done.exit_code, done.stderr


def _resident(what: str) -> float:
    """MiB of this process: VmRSS now, or VmHWM at most since the last reset."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{what}:")[2].split()[0]) / 1024


def _reset() -> float:
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def main() -> None:
    """Feed many and print what happened, with the largest rise of the resident memory."""
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    counts: dict[tuple[str, int], int] = collections.Counter()
    rise: dict[str, float] = collections.defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        victim = Victim(Path(folder))
        warm = 3 * len(MUTATIONS)
        for number in range(-warm, count):
            before = []
            name, code, _ = feed(victim, number, seed, lambda: before.append(_reset()))  # noqa: B023  # called at once
            if number >= 0:  # what was imported for the first files is not theirs
                counts[name, code] += 1
                rise[name] = max(rise[name], _resident("VmHWM") - before[0])
        size = len(victim.checkpoint) / 2**20
    for (name, code), n in sorted(counts.items()):
        sys.stdout.write(f"{name}: exit code {code}: {n}\n")
    worst = ", ".join(f"{name} {mib:.1f}" for name, mib in rise.items())
    sys.stdout.write(f"{count} files; MiB of resident memory more, at most: {worst}; a whole file has {size:.1f}\n")


if __name__ == "__main__":
    main()
