"""nn.Module -> Trace: the model is run in both modes, and what it does is written down.

Without memory where that is possible, so that it takes no longer for a large model than for a small one; where an
operator needs data, on a small real copy. No values of the model's own are read otherwise.
"""

from __future__ import annotations

import functools
import os
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from normfree.errors import UsageError, one_line
from normfree.tracing.copying import meta_copy, real_copy
from normfree.tracing.inputs import Guess, Inputs, arguments, guesses
from normfree.tracing.running import disguised, leaves_of, record
from normfree.tracing.traces import MODES, Graph, Trace

__all__ = ["example_input", "trace", "where"]

_ONE_AT_A_TIME = threading.RLock()  # random generators of Python and NumPy are the whole process's


def trace(model: nn.Module, copied: nn.Module, sites: frozenset[str], inputs: Inputs | None = None) -> Trace:
    """Look at what a model, of which ``copied`` is a copy without memory, does in train and in eval mode.

    Names of norms, or of what has taken their place, are ``sites``; arguments of one call are found if not given.
    """
    given = None if inputs is None else [Guess(*arguments(inputs), "as given")]
    found = Trace({}, unseen="no input is known")
    look = _Look(model, copied, sites)
    with _ONE_AT_A_TIME, torch.random.fork_rng(devices=[]):
        for guess in guesses(model) if given is None else given:
            seen = look.at(guess, given=given is not None)
            if len(seen.graphs) > len(found.graphs) or not found.looked:
                found = seen
            if len(found.graphs) == len(MODES):
                break
    return found


@dataclass
class _Look:
    """The copies of one model on which it is looked at."""

    model: nn.Module
    meta: nn.Module
    sites: frozenset[str]

    @functools.cached_property
    def real(self) -> nn.Module:
        return _smaller(real_copy(self.model))

    @functools.cached_property
    def leaves(self) -> dict[str, bool]:
        return leaves_of(self.meta, self.sites)

    def at(self, guess: Guess, *, given: bool) -> Trace:
        """Run the model on something, without memory if that will do."""
        to_meta = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (guess.args, dict(guess.kwargs)))
        seen, without_data = self._run(self.meta, to_meta, guess)
        if len(seen.graphs) == len(MODES) or not (given or without_data):
            return seen
        like = next((p for p in self.real.parameters()), torch.empty(0))
        real, _ = self._run(self.real, guess.real(like), guess)
        return real if len(real.graphs) >= len(seen.graphs) else seen

    def _run(self, copied: nn.Module, arguments: Any, guess: Guess) -> tuple[Trace, bool]:
        """Return what was seen, and whether it ended because an operator needs data."""
        run = functools.partial(record, copied, self.sites, self.leaves, arguments)
        graphs: dict[str, Graph] = {}
        why, without_data, deaf = "", False, False
        try:
            graphs["eval"] = run(training=False)
            elsewise = self._in_disguise(copied, run, training=True)
            if elsewise == graphs["eval"].spelled:
                return Trace(dict.fromkeys(MODES, graphs["eval"]), str(guess), deaf=True), False
            graphs["train"] = run(training=True)
            if elsewise == graphs["train"].spelled:
                deaf = self._in_disguise(copied, run, training=False) == graphs["eval"].spelled
        except Exception as error:  # whatever a model raises for what it does not take; many need targets to train
            why = f"{'in train mode: ' if graphs else ''}{where(error)}"
            without_data = isinstance(error, NotImplementedError) or "meta" in str(error)

        def again(classes: Mapping[str, type[nn.Module]]) -> dict[str, Graph]:
            with disguised(copied, classes) as real:
                return {mode: run(training=mode == "train", classes=real) for mode in graphs}

        return Trace(graphs, str(guess), why, deaf, again), without_data

    def _in_disguise(self, copied: nn.Module, run: Callable[..., Graph], training: bool) -> list[Any] | None:
        """Return what a mode does while no module answers to the class that it has."""
        try:
            with disguised(copied, _disguises(copied, self.sites)) as real:
                return run(training=training, classes=real).spelled
        except Exception:  # what the mode itself raises is seen when it runs as it is
            return None


def _disguises(model: nn.Module, sites: frozenset[str]) -> dict[str, type[nn.Module]]:
    """Return another class for every module but the model itself."""
    kinds = set(map(type, model.modules()))
    made = {cls: type(f"Scaled{cls.__name__}", (cls,), {"__module__": cls.__module__}) for cls in kinds}
    plain = ((name, m) for name, m in model.named_modules() if name and not isinstance(m, torch.jit.ScriptModule))
    return {name: nn.Identity if name in sites else made[type(module)] for name, module in plain}


def where(error: Exception) -> str:
    """Return an error in one line, with the line of the user's code that raised it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_OTHERS)]
    place = f" ({frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""
    return f"{one_line(error)}{place}"


_OTHERS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), str(Path(os.__file__).parent), "<")


def _smaller(model: nn.Module) -> nn.Module:
    """Let a detector look at small images and keep little of what it finds: only what it does to them counts."""
    transform: Any = getattr(model, "transform", None)
    if hasattr(transform, "min_size") and hasattr(transform, "max_size"):
        transform.min_size, transform.max_size = (64,), 64
        for module in model.modules():
            counts = module.__dict__.keys() & {"detections_per_img", "topk_candidates"}
            module.__dict__.update(dict.fromkeys(counts, 2))
    return model


def example_input(model: nn.Module, batch: int = 2, size: int | None = None) -> Inputs:
    """Return white noise ``(N, C, *)`` that the model takes in both modes, small where it may be.

    ``size`` is the length of every dimension but channels, where the caller knows better.

    Raises:
        UsageError: Nothing says what to try, or the model takes none of it.
    """
    like = next(model.parameters())
    look, errors = _Look(model, meta_copy(model), frozenset()), dict[str, None]()
    with _ONE_AT_A_TIME, torch.random.fork_rng(devices=[]):
        for guess in guesses(model, batch, size, small=True):
            seen = look.at(guess, given=False)
            if len(seen.graphs) == len(MODES):
                args, kwargs = guess.real(like)
                return kwargs or (args[0] if len(args) == 1 else args)
            errors[f"{seen.looked}: {seen.unseen}"[:300]] = None
    tried = "; ".join(errors) or "no layer tells the shape"
    raise UsageError(f"no input is known for {type(model).__name__}: pass inputs= (--size) ({tried})")
