"""Write `api.md` from the docstrings of the public names; a test holds the page current.

Run: python examples/guides/write_api.py
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import normfree

PAGE = Path(__file__).with_name("api.md")
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Warns", "Example")
GROUPS = {
    "Convert": ("convert", "convert_", "plan", "Plan", "SkipInit"),
    "Prove": ("verify", "Report"),
    "Train": ("calibrate", "watch", "param_groups", "clip_grad", "signals", "Signals"),
    "Save, load, deploy": ("save", "load", "fuse", "export", "restore"),
    "Norm types": ("register_norm", "Norm"),
}


def plain(text: str) -> str:
    """Turn the marks of docstrings into those of Markdown, and paragraphs into lines."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`")
    return " ".join(text.split())


def items(text: str) -> Iterator[str]:
    """List the entries of a section: a name, or an error, and what is said of it."""
    for entry in re.split(r"\n(?=\S)", textwrap.dedent(text)):
        name, colon, said = entry.partition(":")
        yield f"- `{name}`: {plain(said)}" if colon and re.fullmatch(r"[\w.]+", name) else plain(entry)


def body(docstring: str) -> Iterator[str]:
    """Write a docstring in Google's form."""
    titles = "|".join(SECTIONS)
    for paragraph in re.split(rf"\n\n(?=\S)|\n(?=(?:{titles}):\n)", inspect.cleandoc(docstring)):
        title, _, rest = paragraph.partition(":\n")
        if title == "Example":
            yield f"```pycon\n{textwrap.dedent(rest).strip()}\n```"
        elif title in SECTIONS:
            yield f"**{title}**\n\n" + "\n".join(items(rest))
        else:
            yield plain(paragraph)


def signature(name: str, value: Any) -> str:
    """Write how a function is called, an argument a line where they do not fit into one."""
    called, written = inspect.signature(value), list[str]()
    for parameter in called.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in written:
            written.append("*")
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        written.append(f"{parameter.name}: {parameter.annotation}{default}")
    whole = f"{name}({', '.join(written)}) -> {called.return_annotation}"
    listed = "".join(f"    {text},\n" for text in written)
    return whole if len(whole) <= 100 else f"{name}(\n{listed}) -> {called.return_annotation}"


def section(name: str) -> Iterator[str]:
    """Write one name."""
    value = getattr(normfree, name)
    yield f"### `{name}`"
    if inspect.isfunction(value):
        yield f"```text\n{signature(name, value)}\n```"
    yield from body(value.__doc__)


def page() -> str:
    """Write the page."""
    named = {name for names in GROUPS.values() for name in names} | {"errors"}
    if named != set(normfree.__all__):
        raise SystemExit(f"no group holds, or two hold: {sorted(named ^ set(normfree.__all__))}")
    parts = [
        "# The API",
        "Written by `examples/guides/write_api.py` from the docstrings, whose examples the tests run.",
    ]
    for group, names in GROUPS.items():
        parts += [f"## {group}", *(part for name in names for part in section(name))]
    errors = [getattr(normfree.errors, name) for name in normfree.errors.__all__]
    kinds = [error for error in errors if isinstance(error, type)]
    parts += ["## Errors", *body(normfree.errors.__doc__ or "")]
    parts += [
        "\n".join(f"- `{kind.__name__}`: {plain((kind.__doc__ or '').partition(chr(10) * 2)[0])}" for kind in kinds)
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
