"""The command line: words come in, tables or JSON and an exit code go out; a file for each family of commands.

Nothing here imports torch before a command runs: ``normfree --help`` must answer at once.
"""

from __future__ import annotations

from normfree.cli import bench, conversion, deployment, signals
from normfree.cli.options import app

__all__ = ["app", "bench", "conversion", "deployment", "main", "signals"]


def main() -> None:
    """Run the command line."""
    app()
