"""README and guides are the manual: every block of code runs, every link leads somewhere, no paragraph is too long."""

from __future__ import annotations

import doctest
import importlib
import os
import pkgutil
import re
import shlex
import site
import subprocess
import sys
import venv
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import finetune_timm
import pytest
import scripts
import torch
import torchvision
import write_api
from accelerate.commands.launch import launch_command_parser
from harness import ROOT

import normfree

EXAMPLES = ROOT / "examples"
README, RESULTS, API = ROOT / "README.md", EXAMPLES / "results" / "README.md", EXAMPLES / "guides" / "api.md"
GUIDES = sorted({*(EXAMPLES / "guides").glob("*.md")} - {API})  # the blocks of api.md are run where they come from
PAGES = [README, EXAMPLES / "README.md", *GUIDES, RESULTS, API]
TEST_COMMAND = 'pip install ".[test]" && pytest'


@dataclass(frozen=True)
class Block:
    """A block of code, by where it stands."""

    page: str
    number: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}-{self.number}"


def blocks(page: Path) -> list[Block]:
    """The blocks of a page."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(str(page.relative_to(ROOT)), i, *languages_and_text) for i, languages_and_text in enumerate(found)]


BLOCKS = [block for page in PAGES if page != API for block in blocks(page)]
PYTHON, SHELL, CONSOLE = ([b for b in BLOCKS if b.language == kind] for kind in ("python", "bash", "pycon"))


def test_every_block_has_a_language_that_is_run() -> None:
    assert {block.language for block in BLOCKS} == {"python", "bash", "pycon", "bibtex"}
    of_readme = "".join(block.text for block in SHELL if block.page == "README.md")
    assert TEST_COMMAND in of_readme
    assert TEST_COMMAND in (ROOT / ".ci" / "run").read_text()


def prose(page: Path) -> str:
    """A page without its blocks of code and its tables."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^\|.*$", "", text, flags=re.MULTILINE)


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 200
    for page in (README, EXAMPLES / "README.md", *GUIDES):
        paragraphs = re.split(r"\n\n|\n(?=- |\d+\. )", prose(page))
        assert [text for text in paragraphs if len(text.strip().splitlines()) > 4] == [], page.name


def anchors(page: Path) -> set[str]:
    """What a link may name after its `#`, as GitHub makes it of the headings."""
    seen: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        seen.append(name if name not in seen else f"{name}-{sum(each.startswith(name) for each in seen)}")
    return set(seen)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_every_page_is_reached_from_the_readme() -> None:
    linked = {
        (README.parent / target.partition("#")[0]).resolve()
        for target in re.findall(r"\]\(([^)\s]+)\)", README.read_text())
    }
    assert {page for page in PAGES if page != README} <= linked


def test_examples_are_listed_with_what_they_show() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    assert [path.name for path in EXAMPLES.rglob("*.py") if path.name not in listed] == []


def test_the_api_page_is_what_the_docstrings_say() -> None:
    assert API.read_text() == write_api.page(), "renew it: python examples/guides/write_api.py"


def test_every_public_name_has_an_example() -> None:
    assert [name for name in normfree.__all__ if ">>>" not in (getattr(normfree, name).__doc__ or "")] == []


def test_accuracies_are_those_of_the_tables() -> None:
    tables = "".join(path.read_text() for path in RESULTS.parent.glob("*.md") if path != RESULTS)
    figures = re.findall(r"\d+\.\d ± \d+\.\d \(2\^-?\d+\)", RESULTS.read_text())
    assert len(figures) > 60
    assert [figure for figure in figures if figure not in tables] == []


@pytest.mark.filterwarnings("ignore:Secure RNG turned off")  # Opacus says so of every engine without torchcsprng
@pytest.mark.filterwarnings("ignore::normfree.checkpoint.saving.SaveWarning")  # of models that no zoo knows
@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_blocks_run(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block.text, str(block), "exec"), {"__name__": "manual"})  # noqa: S102


@pytest.mark.parametrize("block", CONSOLE, ids=str)
def test_console_blocks_print_what_they_say(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    test = doctest.DocTestParser().get_doctest(block.text, {}, str(block), None, None)
    assert test.examples
    failures: list[str] = []
    doctest.DocTestRunner().run(test, out=failures.append)
    assert not failures, "".join(failures)


def commands(block: Block) -> list[list[str]]:
    """The words of every command of a shell block."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [shlex.split(part) for line in lines for part in line.split("&&")]


ELSEWHERE = {"pytest", "quickstart.py", "finetune_plain.py", "finetune_lightning.py", "finetune_transformers.py"}
"""What runs this, and what the tests of the examples run."""


def run_here(program: str, *words: str) -> None:
    """Do in this process what a shell would start; what needs others is held to what it may be asked."""
    if {program, *(Path(word).name for word in words)} & ELSEWHERE:
        return
    if program == "normfree":
        scripts.normfree(*words)
    elif program == "python" and words[0] == "-c":
        exec(compile(words[1], "python -c", "exec"), {"__name__": "__main__"})  # noqa: S102
    elif program == "python":
        scripts.run_here(Path(words[0]).name, *words[1:])
    elif program == "accelerate":
        assert words[0] == "launch"
        launched = launch_command_parser().parse_args(words[1:])
        with scripts.as_if_alone(*map(str, (launched.training_script, *launched.training_script_args))):
            assert finetune_timm.parse().cpu
    elif program == "pip":
        extras = re.findall(r"\w+", words[-1])
        assert (words[0], words[-1][0]) == ("install", ".")
        assert set(extras) <= set(metadata.metadata("normfree").get_all("Provides-Extra"))
    elif program in ("mkdir", "cp"):
        subprocess.run([program, *words], check=True)
    else:
        pytest.fail(f"{program} is not known here")


def given(block: Block, folder: Path) -> None:
    """Put the checkpoint there that a block takes for granted."""
    if "resnet18.pth" in block.text:
        torch.save(torchvision.models.resnet18().state_dict(), folder / "resnet18.pth")


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_shell_blocks_run_here(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given(block, tmp_path)
    asked = commands(block)
    for words in asked:
        run_here(*words)
    written = {path.name for path in tmp_path.rglob("*")}
    for words in asked:
        for option in {"-o", "--plot"} & set(words):
            assert words[words.index(option) + 1] in written


def copied_to(folder: Path) -> None:
    """Copy what git tracks, so that `pip install .` builds what a user gets."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():  # it may be removed, and not yet committed
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with this package alone; it sees the other one's, as torch is large."""
    folder, source = tmp_path_factory.mktemp("venv"), tmp_path_factory.mktemp("source")
    venv.create(folder, with_pip=True)
    packages = next((folder / "lib").glob("python*")) / "site-packages"
    (packages / "outer.pth").write_text("\n".join(site.getsitepackages()))
    copied_to(source)
    subprocess.run([folder / "bin" / "pip", "install", "-q", "--no-deps", "--ignore-installed", source], check=True)
    for script in Path(sys.executable).parent.iterdir():  # commands such as pytest belong to the other one's python
        words = script.read_bytes() if script.is_file() else b""
        if words.startswith(b"#!" + sys.executable.encode()):
            own = folder / "bin" / script.name
            own.write_bytes(words.replace(sys.executable.encode(), str(folder / "bin" / "python").encode(), 1))
            own.chmod(0o755)
    return folder


@pytest.mark.broad
@pytest.mark.parametrize("block", SHELL, ids=str)
def test_shell_blocks_run_in_a_fresh_environment(block: Block, fresh: Path, tmp_path: Path) -> None:
    copied_to(tmp_path)
    given(block, tmp_path)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(fresh / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
        # The test command would run this test again, and so for ever: here it installs and collects. CI runs it whole.
        "PYTEST_ADDOPTS": "--collect-only -q -n 0",
        "PYTHONPATH": "",
    }
    done = subprocess.run(
        ["bash", "-e", "-c", block.text], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_docstring_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [m.name for m in pkgutil.walk_packages(normfree.__path__, "normfree.") if "__main__" not in m.name]
    results = {name: doctest.testmod(importlib.import_module(name)) for name in names}
    assert {name: result.failed for name, result in results.items() if result.failed} == {}
    assert sum(result.attempted for result in results.values()) >= 15
