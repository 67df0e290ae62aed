"""A checkpoint of one conversion in a model of another: ``load_state_dict`` says what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from normfree.layers import CONSTANTS

__all__ = ["hint_", "no_hint_"]


def hint_(model: nn.Module) -> None:
    """Let a converted model name the way out when it is to load what was converted by another plan."""
    model.register_load_state_dict_pre_hook(_hint)  # type: ignore[no-untyped-call]  # torch's own


def no_hint_(model: nn.Module) -> None:
    """Take it off again."""
    hooks: dict[int, Any] = model._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, "hook", None) is _hint]:
        del hooks[key]


def _hint(module: nn.Module, state: Mapping[str, Any], prefix: str, *told: Any) -> None:
    """Compare what carries constants and scalars, of the layers that both have; torch does not say if it is strict."""
    theirs = {key.removeprefix(prefix) for key in state if key.startswith(prefix)}
    own = module.state_dict(keep_vars=True).keys()
    differ = (key.rpartition(".") for key in theirs ^ own)
    if any(leaf in (*CONSTANTS, "raw_alpha") and f"{layer}.weight" in theirs & own for layer, _, leaf in differ):
        told[-1].append(
            "The checkpoint was converted by another plan than this model, or not at all. Convert by the plan of the "
            "checkpoint: normfree.convert(model, plan=...), with normfree.Plan.of(model) of what was saved, its JSON, "
            "or a file that normfree.save wrote."
        )
