"""Prove: a model and its original come in, a report goes out; a file for each proof, and :data:`PROOFS` lists them."""

from __future__ import annotations

from collections.abc import Callable

from normfree.proofs.batch import batch_independent
from normfree.proofs.branches import branches_vanish
from normfree.proofs.case import Case, Found, Proof
from normfree.proofs.forward import no_norm_runs, same_function
from normfree.proofs.learning import everything_learns
from normfree.proofs.state import clean_state

__all__ = ["PROOFS", "Case", "Proof"]

PROOFS: dict[str, Callable[[Case], Found]] = {
    "no batch-norm operator runs": no_norm_runs,
    "no output depends on the rest of the batch": batch_independent,
    "output equals the original's in eval mode": same_function,
    "alpha = 0 leaves exactly the skip paths": branches_vanish,
    "everything learns": everything_learns,
    "no statistics are left in the state": clean_state,
}
"""What is claimed, and what proves it."""
