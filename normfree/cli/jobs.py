"""What ``normfree convert`` does with one checkpoint, and with a folder of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfree.cli.options import Loaded, build_original
from normfree.cli.printing import note
from normfree.errors import NormfreeError, UsageError, one_line

if TYPE_CHECKING:
    from normfree.plans import Plan
    from normfree.proofs.verify import Report

__all__ = ["each", "prove", "run"]


def prove(step: Callable[[str], None], *arguments: Any, **more: Any) -> Report:
    """Run the six proofs, as :func:`normfree.proofs.verify.each_proof` does, and say of each that it is done."""
    from normfree.proofs.verify import Report, each_proof

    done = []
    for number, proof in enumerate(each_proof(*arguments, **more), start=1):
        done.append(proof)
        step(f"proof {number} of 6")
    return Report(tuple(done))


def run(
    source: str,
    num_classes: int | None,
    asked: dict[str, Any],
    force: bool,
    proofs: bool,
    seed: int,
    size: int | None,
    loaded: Loaded,
    out: Path,
    step: Callable[[str], None],
) -> tuple[str, Plan, Report]:
    """Convert one checkpoint and write it, if no proof fails; without proofs it is streamed.

    Returns:
        The unambiguous name of the architecture, the plan, and the proofs if there are any.
    """
    import torch

    from normfree import checkpoint as files
    from normfree import conversion, zoo
    from normfree.files import Choice
    from normfree.options import Options
    from normfree.planning.plan import look
    from normfree.proofs import verify
    from normfree.proofs.reference import Reference
    from normfree.tracing.trace import example_input

    checkpoint = loaded.checkpoint
    files.check_target(out, overwrite=force, inputs=() if checkpoint is None else (checkpoint,))
    about: dict[str, Any] = {"num_classes": num_classes, "overwrite": force}
    if checkpoint is not None and not proofs:
        step("converting")
        torch.manual_seed(seed)
        about |= {"choice": Choice(loaded.key, loaded.prefix), "tell": note}
        plan = files.convert_file(source, checkpoint, out, **about, size=size, **asked)
        return str(zoo.find(source)), plan, verify.Report(())
    name, original = build_original(source, step, loaded, num_classes)
    step("converting")
    torch.manual_seed(seed)
    given = None if size is None else example_input(original, size=size)
    plan, _ = look(original, Options(**asked, inputs=given), loaded=bool(loaded))
    model = conversion.convert(original, plan=plan, inputs=given)
    report, reference = verify.Report(()), None
    if proofs:
        x = example_input(model) if given is None else given
        report = prove(step, model, original, x)
        exact = plan.init == "preserve" and plan.alpha == 1 and report.proofs[2].passed
        reference = Reference.of(original, x) if exact and isinstance(x, torch.Tensor) else None
    if report.ok:
        step("writing")
        files.save(model, out, source=name, reference=reference, **about)
    return name, plan, report


def each(
    one: Callable[[Loaded, Path, Callable[[str], None]], tuple[str, Plan, Report]], loaded: Loaded, out: Path, step: Any
) -> Iterator[tuple[Path, Path, str | None]]:
    """Convert every checkpoint of a folder into the folder ``out`` by ``one``, whatever becomes of the others.

    Yields:
        The checkpoint, its output, and what went wrong.

    Raises:
        UsageError: There is none, or the output is no folder.
    """
    from normfree.files import ENDINGS

    folder = Path(loaded.checkpoint or ".")
    found = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in ENDINGS)
    if not found:
        raise UsageError(f"{folder} holds no checkpoints ({' '.join(ENDINGS)})")
    if out.suffix in ENDINGS or (out.exists() and not out.is_dir()):
        raise UsageError(f"{out}: a folder of checkpoints is converted into a folder; name one")
    out.mkdir(parents=True, exist_ok=True)
    for path in found:
        step(path.name, len(found))
        written = out / f"{path.name.removesuffix('.tar').rpartition('.')[0] or path.name}.safetensors"
        try:
            *_, report = one(replace(loaded, checkpoint=path), written, lambda _: None)
            failed = [proof.name for proof in report.proofs if proof.passed is False]
            yield path, written, f"a proof failed: {', '.join(failed)}" if failed else None
        except NormfreeError as error:
            yield path, written, str(error)
        except Exception as error:  # whatever one file leads to, it must not stop the rest
            yield path, written, one_line(error)
