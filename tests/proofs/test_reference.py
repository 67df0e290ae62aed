"""Recorded outputs tell the original from another, with nothing else at hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from harness import noise, randomise
from tied import Net

import normfree
from normfree.files.typed_json import from_plain
from normfree.proofs.reference import Reference

X = noise(2, 3, 8, 8)


def test_a_reference_tells_the_original_from_another(tmp_path: Path) -> None:
    original = randomise(Net()).eval()
    reference = Reference.of(original, X)
    assert from_plain(Reference, json.loads(json.dumps(dataclasses.asdict(reference)))) == reference
    error = reference.error(normfree.convert(original))
    assert error is not None
    assert error <= 8 * reference.rounding
    other = reference.error(normfree.convert(randomise(Net(), seed=1)))
    assert other is not None
    assert other > 1e-3
    assert dataclasses.replace(reference, first=(0.0,)).error(original) is None
