"""What ``normfree convert`` does with one checkpoint, and with a folder of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfree.cli.options import Loaded, build_original
from normfree.cli.printing import note
from normfree.errors import NormfreeError, UsageError, one_line

if TYPE_CHECKING:
    from normfree.plans import Plan
    from normfree.proofs.verify import Report

__all__ = ["Job", "each", "prove", "run"]


@dataclass(frozen=True)
class Job:
    """One conversion.

    Attributes:
        source: Name of the architecture.
        out: Where to.
        loaded: Its weights.
        num_classes: Width of its classifier.
        options: As for :func:`normfree.convert`.
        force: Replace what is there.
        proofs: Prove it before writing; a checkpoint is streamed otherwise.
        seed: Of the weights that are drawn.
        size: Height and width of what the network is run on, if it is not to be found.
    """

    source: str
    out: Path
    loaded: Loaded
    num_classes: int | None
    options: dict[str, Any]
    force: bool
    proofs: bool
    seed: int
    size: int | None


def prove(step: Callable[[str], None], *arguments: Any, **more: Any) -> Report:
    """Run the six proofs, as :func:`normfree.proofs.verify.each_proof` does, and say of each that it is done."""
    from normfree.proofs.verify import Report, each_proof

    done = []
    for number, proof in enumerate(each_proof(*arguments, **more), start=1):
        done.append(proof)
        step(f"proof {number} of 6")
    return Report(tuple(done))


def run(job: Job, step: Callable[[str], None]) -> tuple[str, Plan, Report]:
    """Convert one checkpoint and write it, if no proof fails.

    Returns:
        The unambiguous name of the architecture, the plan, and the proofs if there are any.
    """
    step("importing torch")
    import torch

    from normfree import checkpoint as files
    from normfree import conversion, zoo
    from normfree.files import Choice
    from normfree.options import Options
    from normfree.planning.plan import look
    from normfree.proofs import verify
    from normfree.proofs.reference import Reference
    from normfree.tracing.trace import example_input

    checkpoint = job.loaded.checkpoint
    inputs = () if checkpoint is None else (checkpoint,)
    files.check_target(job.out, overwrite=job.force, inputs=inputs)
    about: dict[str, Any] = {"num_classes": job.num_classes, "overwrite": job.force}
    if checkpoint is not None and not job.proofs:
        step("converting")
        torch.manual_seed(job.seed)
        about |= {"choice": Choice(job.loaded.key, job.loaded.prefix), "tell": note}
        plan = files.convert_file(job.source, checkpoint, job.out, **about, size=job.size, **job.options)
        return str(zoo.find(job.source)), plan, verify.Report(())
    name, original = build_original(job.source, step, job.loaded, job.num_classes)
    step("converting")
    torch.manual_seed(job.seed)
    given = None if job.size is None else example_input(original, size=job.size)
    plan, _ = look(original, Options(**job.options, inputs=given), loaded=bool(job.loaded))
    model = conversion.convert(original, plan=plan, inputs=given)
    report, reference = verify.Report(()), None
    if job.proofs:
        x = example_input(model) if given is None else given
        report = prove(step, model, original, x)
        exact = plan.init == "preserve" and plan.alpha == 1 and report.proofs[2].passed
        reference = Reference.of(original, x) if exact and isinstance(x, torch.Tensor) else None
    if report.ok:
        step("writing")
        files.save(model, job.out, source=name, reference=reference, **about)
    return name, plan, report


def each(job: Job, step: Any) -> Iterator[tuple[Path, Path, str | None]]:
    """Convert every checkpoint of a folder into the folder ``job.out``, whatever becomes of the others.

    Yields:
        The checkpoint, its output, and what went wrong.

    Raises:
        UsageError: There is none, or the output is no folder.
    """
    step("importing torch")
    from normfree.files import ENDINGS

    folder = Path(job.loaded.checkpoint or ".")
    found = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in ENDINGS)
    if not found:
        raise UsageError(f"{folder} holds no checkpoints ({' '.join(ENDINGS)})")
    if job.out.suffix in ENDINGS or (job.out.exists() and not job.out.is_dir()):
        raise UsageError(f"{job.out}: a folder of checkpoints is converted into a folder; name one")
    job.out.mkdir(parents=True, exist_ok=True)
    step.total(len(found) + 1)
    for path in found:
        step(path.name)
        out = job.out / f"{path.name.removesuffix('.tar').rpartition('.')[0] or path.name}.safetensors"
        try:
            one = replace(job, loaded=replace(job.loaded, checkpoint=path), out=out)
            *_, report = run(one, lambda _: None)
            failed = [proof.name for proof in report.proofs if proof.passed is False]
            yield path, out, f"a proof failed: {', '.join(failed)}" if failed else None
        except NormfreeError as error:
            yield path, out, str(error)
        except Exception as error:  # whatever one file leads to, it must not stop the rest
            yield path, out, one_line(error)
