"""Prove: a model and its original come in, a report goes out; a file for each proof, and :data:`PROOFS` lists them."""

from __future__ import annotations

from collections.abc import Callable

from normfree.proofs.batch import batch_independent
from normfree.proofs.branches import branches_vanish
from normfree.proofs.case import Case, Proof
from normfree.proofs.forward import no_norm_runs, same_function
from normfree.proofs.learning import everything_learns
from normfree.proofs.state import clean_state

__all__ = ["PROOFS", "Case", "Proof"]

PROOFS: tuple[Callable[[Case], Proof], ...] = (
    no_norm_runs,
    batch_independent,
    same_function,
    branches_vanish,
    everything_learns,
    clean_state,
)
