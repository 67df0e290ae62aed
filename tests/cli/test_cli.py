"""The command line: what it prints, what it writes, and how it exits."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import timm
import torch
from harness import randomise
from typer.testing import CliRunner, Result

import normfree
from normfree.checkpoint.header import read_plan
from normfree.cli import app, main

RUNNER = CliRunner()


def run(*arguments: object) -> Result:
    return RUNNER.invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ResNet of 5 classes as a training script saves it."""
    model = timm.create_model("test_resnet", num_classes=5)
    path = tmp_path_factory.mktemp("checkpoint") / "last.pth.tar"
    state = {f"module.{key}": value for key, value in randomise(model).state_dict().items()}
    torch.save({"epoch": 1, "state_dict": state}, path)
    return path


@pytest.fixture(scope="module")
def converted(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out.safetensors"
    done = run("convert", "timm:test_resnet", "-o", out, "--checkpoint", checkpoint, "--num-classes", 5)
    assert done.exit_code == 0, done.output
    return out


def test_convert_writes_a_proven_model(converted: Path, checkpoint: Path) -> None:
    original = timm.create_model("test_resnet", num_classes=5, checkpoint_path=str(checkpoint)).eval()
    loaded = normfree.load(converted).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(loaded(x), original(x), rtol=1e-4, atol=1e-5)


def test_convert_prints_plan_and_proofs(tmp_path: Path) -> None:
    done = run("convert", "timm:test_resnet", "-o", tmp_path / "r.safetensors")
    assert done.exit_code == 0
    assert "init: skipinit (no norm has been trained), alpha starts at 0, 15 weights are drawn anew" in done.stdout
    assert "4 branches exactly zero at alpha = 0" in done.stdout
    assert f"wrote {tmp_path / 'r.safetensors'}" in done.stdout


def test_convert_as_json(tmp_path: Path, checkpoint: Path) -> None:
    out = tmp_path / "r.safetensors"
    options = ("--checkpoint", checkpoint, "--num-classes", 5, "--json", "--exclude", "bn1", "--alpha", "0.5")
    done = run("convert", "timm:test_resnet", "-o", out, *options)
    assert done.exit_code == 0, done.output
    body = json.loads(done.stdout)
    assert body["ok"]
    assert body["source"] == "timm:test_resnet"
    assert body["output"] == str(out)
    assert [n["action"] for n in body["plan"]["norms"]].count("keep") == 1
    assert body["plan"]["alpha"] == 0.5
    assert [p["passed"] for p in body["proofs"]] == [True, None, None, True, True, True]
    assert isinstance(normfree.load(out).bn1, torch.nn.BatchNorm2d)


def test_no_reset_keeps_the_weights_of_the_checkpoint(tmp_path: Path, checkpoint: Path) -> None:
    out = tmp_path / "r.safetensors"
    options = ("--checkpoint", checkpoint, "--num-classes", 5, "--init", "skipinit", "--no-reset")
    done = run("convert", "timm:test_resnet", "-o", out, *options)
    assert done.exit_code == 0, done.output
    original = timm.create_model("test_resnet", num_classes=5, checkpoint_path=str(checkpoint))
    assert torch.equal(normfree.load(out).layer1[0].conv1.weight, original.layer1[0].conv1.weight)


def test_activations_may_be_kept_from_working_in_place(tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    done = run("convert", "timm:test_resnet", "-o", out, "--no-inplace-activations", "--no-verify")
    assert done.exit_code == 0, done.output
    acts = [module.inplace for module in normfree.load(out).modules() if hasattr(module, "inplace")]
    assert acts
    assert not any(acts)


def test_verify_uses_the_recorded_reference(converted: Path) -> None:
    done = run("verify", converted, "--json")
    assert done.exit_code == 0, done.output
    body = json.loads(done.stdout)
    assert [p["passed"] for p in body["proofs"]] == [True] * 6
    assert "recorded output" in body["proofs"][2]["detail"]


def test_verify_against_the_original(converted: Path, checkpoint: Path) -> None:
    done = run("verify", converted, "--checkpoint", checkpoint)
    assert done.exit_code == 0, done.output
    assert "in float64" in done.stdout


def test_verify_fails_for_another_original(converted: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    torch.save(randomise(timm.create_model("test_resnet", num_classes=5), seed=5).state_dict(), other)
    done = run("verify", converted, "--checkpoint", other)
    assert done.exit_code == 1
    assert "FAILED" in done.stdout


def test_inspect_shows_every_norm_and_sum() -> None:
    done = run("inspect", "timm:test_resnet")
    assert done.exit_code == 0
    for text in ("layer4.0.bn2", "BatchNorm2d", "layer4.0.conv2 (Conv2d)", "the bias moves onto layer4.0.conv2"):
        assert text in done.stdout
    assert "layer4.0.add" in done.stdout
    assert "sums: 4, 4 residual" in done.stdout
    body = json.loads(run("inspect", "timm:test_resnet", "--json").stdout)
    assert len(body["norms"]) == 15


def test_the_size_of_what_is_looked_at_may_be_given(tmp_path: Path, checkpoint: Path) -> None:
    done = run("inspect", "timm:test_resnet", "--size", 96, "--json")
    assert "(2, 3, 96, 96)" in json.loads(done.stdout)["looked"]
    for more in ((), ("--no-verify", "--checkpoint", checkpoint, "--num-classes", 5, "--force")):
        out = tmp_path / "r.safetensors"
        assert run("convert", "timm:test_resnet", "-o", out, "--size", 96, *more).exit_code == 0
        assert "(2, 3, 96, 96)" in read_plan(out).looked
        assert run("verify", out, "--size", 96).exit_code == 0


def test_a_size_that_the_network_does_not_take_is_wrong_usage() -> None:
    done = run("inspect", "torchvision:vit_b_16", "--size", 32)
    assert (done.exit_code, "pass --size" in done.stderr) == (2, True)


def test_a_name_in_both_libraries_is_torchvisions() -> None:
    done = run("inspect", "resnet18", "--json")
    assert done.exit_code == 0
    assert "taking torchvision:resnet18" in done.stderr
    assert "layer1.0.bn1" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["inspect", "torchvision:resnet19"], 2, "did you mean resnet"),
        (["inspect", "timm:nothing_like_it"], 2, "timm has no model"),
        (["inspect", "keras:resnet50"], 2, "unknown library 'keras'"),
        (["inspect", "no_such_model_anywhere"], 2, "neither torchvision nor timm"),
        (["inspect", "timm:test_vit"], 1, "holds no batch normalisation"),
        (["inspect", "torchvision:resnet18", "--init", "magic"], 2, "'magic'"),
        (["inspect", "torchvision:resnet18", "--alpha", "much"], 2, "--alpha is 'much'"),
        (["inspect", "torchvision:resnet18", "--include", "nowhere*"], 2, "no norm and no sum matches 'nowhere*'"),
        (["inspect", "torchvision:resnet18", "--checkpoint", "missing.pth"], 1, "missing.pth: no such file"),
        (["inspect"], 2, "Missing argument"),
        (["convert", "torchvision:resnet18"], 2, "Missing option"),
        (["convert", "torchvision:resnet18", "-o", "nowhere/x.safetensors"], 2, "does not exist"),
        (["convert", "torchvision:resnet18", "-o", "x.pth"], 2, "end its name in .safetensors"),
        (["verify", "missing.safetensors"], 1, "no such file"),
    ],
)
def test_errors_say_what_to_do(
    arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.exit_code == code, done.output
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_errors_as_json() -> None:
    done = run("inspect", "timm:test_vit", "--json")
    assert done.exit_code == 1
    body = json.loads(done.stdout)
    assert body["error"] == "NoNormError"
    assert not body["ok"]


def test_a_wrong_checkpoint_writes_nothing(tmp_path: Path, checkpoint: Path) -> None:
    out = tmp_path / "out.safetensors"
    done = run("convert", "timm:test_resnet", "-o", out, "--checkpoint", checkpoint)
    assert done.exit_code == 1
    assert "fc.weight is (5, 96), the model wants (1000, 96)" in done.stderr
    assert not out.exists()


def test_an_existing_output_needs_force_and_is_never_the_input(converted: Path, checkpoint: Path) -> None:
    before = converted.read_bytes()
    done = run("convert", "timm:test_resnet", "-o", converted, "--no-verify")
    assert done.exit_code == 2
    assert "--force" in done.stderr
    assert converted.read_bytes() == before
    as_input = checkpoint.with_suffix(".safetensors")
    as_input.write_bytes(before)
    done = run("convert", "timm:test_resnet", "-o", as_input, "--checkpoint", as_input, "--force")
    assert done.exit_code == 2
    assert "is the input" in done.stderr
    assert as_input.read_bytes() == before


def test_force_replaces(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"old")
    assert run("convert", "timm:test_resnet", "-o", out, "--force", "--no-verify").exit_code == 0
    assert out.stat().st_size > 1000


def imported(code: str, after: str = "pass") -> set[str]:
    """Return the names of the modules that ``code`` imports in a new process in which ``after`` has run."""
    whole = f"import sys; {after}; before = set(sys.modules); {code}; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def libraries(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules} - sys.stdlib_module_names


def test_help_imports_what_prints_and_no_torch() -> None:
    found = libraries(imported("from normfree.cli import app; app(['--help'], standalone_mode=False)"))
    assert {"normfree", "typer"} <= found
    assert not found & {"torch", "torchvision", "timm", "safetensors", "numpy"}


def test_import_alone_imports_nothing_else() -> None:
    assert libraries(imported("import normfree")) == {"normfree"}


def test_library_needs_torch_and_safetensors_only() -> None:
    found = imported("import normfree; normfree.convert; normfree.load; normfree.verify", after="import torch")
    assert libraries(found) - {"torch"} == {"normfree", "safetensors"}
    slow = {"torch._dynamo", "torch._inductor", "torch._export", "torch.onnx", "torch.distributed"}
    assert not found & slow


def test_the_console_script_is_the_command_line() -> None:
    scripts = metadata.entry_points(group="console_scripts", name="normfree")
    assert {script.load() for script in scripts} == {main}


def test_the_version_and_the_public_names_are_there_to_be_seen() -> None:
    assert run("--version").stdout.strip() == normfree.__version__
    assert "Take the BatchNorm out" in run("--help").stdout
    assert "--install-completion" in run("--help").stdout
    assert {"convert", "fuse", "Plan", "__version__"} <= set(dir(normfree))


@pytest.mark.parametrize("command", ["signals", "bench"])
def test_measurements_take_a_number_of_classes(command: str) -> None:
    options = (
        ("--batch", 2, "--json") if command == "signals" else ("--runs", 0, "--arms", "bn,bare", "--batch", 2, "--json")
    )
    done = run(command, "timm:test_resnet", "--num-classes", 3, "--size", 32, *options)
    assert done.exit_code == 0, done.output


def test_a_fused_file_is_held_to_what_the_original_computed(converted: Path, tmp_path: Path) -> None:
    assert run("fuse", converted, "-o", tmp_path / "fused.safetensors").exit_code == 0
    done = run("verify", tmp_path / "fused.safetensors", "--json")
    assert done.exit_code == 0, done.output
    proofs = json.loads(done.stdout)["proofs"]
    assert proofs[2]["passed"]
    assert "recorded output" in proofs[2]["detail"]
