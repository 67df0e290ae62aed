"""From where a layer was called: the functions that were running, and which of their variables held its input."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

__all__ = ["Call", "Callers", "Place"]


@dataclass(frozen=True)
class Place:
    """Where a function stood that was running.

    Attributes:
        frame: A number for this run of the function.
        code: The function.
        offset: How far it had come in its bytecode.
        holding: Its variables that held the input.
        owner: Its first argument, if that is a module.
    """

    frame: int
    code: CodeType
    offset: int
    holding: tuple[str, ...]
    owner: nn.Module | None


@dataclass(frozen=True)
class Call:
    """One call of a layer: where the functions stood, and the modules that were running, outermost first."""

    places: tuple[Place, ...]
    modules: tuple[str, ...]


class Callers:
    """Numbers the functions that run; while it lives, none of the numbers is given twice."""

    def __init__(self) -> None:
        self._frames: dict[int, tuple[int, FrameType]] = {}

    def forget(self) -> None:
        """Let go of what the functions held."""
        self._frames.clear()

    def look(self, given: Any, modules: list[str]) -> Call:
        """Return from where the layer is called that has been given something."""
        places: list[Place] = []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename != _END:
            if frame.f_code.co_filename not in _BETWEEN:
                number, _ = self._frames.setdefault(id(frame), (len(self._frames), frame))
                holding = tuple(name for name, value in frame.f_locals.items() if value is given)
                owner = frame.f_locals.get(next(iter(frame.f_code.co_varnames), ""))
                owner = owner if isinstance(owner, nn.Module) else None
                places.append(Place(number, frame.f_code, frame.f_lasti, holding, owner))
            frame = frame.f_back
        return Call(tuple(reversed(places)), tuple(modules))


_HERE = Path(__file__).parent
_END = str(_HERE / "running.py")
_BETWEEN = {__file__, str(_HERE / "recorder.py"), torch_module.__file__}
"""What stands between the code that calls a layer and the layer."""
