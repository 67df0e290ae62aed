"""Out of PyTorch: a model as a ``torch.export`` program or an ONNX graph, for any size of the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from normfree import zoo
from normfree.errors import UnsupportedModelError, UsageError, one_line, require, some
from normfree.files import check_output, replacing
from normfree.plans import plan_on
from normfree.proofs.observing import NormSpy, module_stack
from normfree.rewriting.comparing import error_between
from normfree.tracing.copying import deep_copy
from normfree.tracing.inputs import Inputs, arguments, fresh, tensors
from normfree.tracing.trace import example_input

__all__ = ["export", "format_of", "own_input"]

Format = Literal["pt2", "onnx"]
TOLERANCE = 1e-4
"""Relative to the largest output: what another runtime's order of operations may change in float32."""


@torch.no_grad()
def export(
    model: nn.Module,
    path: str | Path,
    inputs: Inputs | None = None,
    *,
    format: Format | None = None,
    dynamic_size: bool = False,
    overwrite: bool = False,
) -> float:
    """Write a model in eval mode as a program that runs without its Python code, and compare the two.

    Fuse it first (:func:`normfree.fuse`): what gain and alpha multiply is then computed once and for all.

    Args:
        model: A converted or fused model; it is not changed.
        path: A file that ends in ``.pt2`` or ``.onnx``.
        inputs: Arguments of ``model`` as for :func:`normfree.verify`, ``(N, C, *)``; the program takes any ``N``.
            Default: white noise of the size that the model was made for, by timm's configuration or torchvision's
            weights.
        format: ``"pt2"`` for ``torch.export.save``, ``"onnx"`` for the exporter of ``torch.onnx`` that uses
            ``torch.export`` (needs ``normfree[export]``). Default: what the ending says.
        dynamic_size: Let the program take images of any height and width too.
        overwrite: Replace an existing file.

    Returns:
        The largest difference between what program and model return for a larger batch (and, with ``dynamic_size``, a
        larger image), relative to the largest value.

    Raises:
        UsageError: The ending does not fit, a package is missing, the batch has fewer than two samples, or nothing says
            which size the model was made for.
        OutputError: The file exists, or cannot be written.
        UnsupportedModelError: The model cannot be exported, a batch norm runs in it, or the program differs from it.

    Example:
        >>> import normfree, torch, torchvision
        >>> model = normfree.fuse(normfree.convert(torchvision.models.resnet18(), init="preserve"))
        >>> error = normfree.export(model, "resnet18.pt2", torch.randn(2, 3, 64, 64))
        >>> torch.export.load("resnet18.pt2").module()(torch.randn(5, 3, 64, 64)).shape
        torch.Size([5, 1000])
    """
    chosen = format_of(path, format)
    out = check_output(path, overwrite=overwrite)
    name = type(model).__name__
    model = deep_copy(model).eval()
    args, kwargs = arguments(own_input(model) if inputs is None else inputs)
    if min((x.shape[0] for x in tree_leaves((args, kwargs)) if _has_batch(x)), default=0) < 2:
        raise UsageError("export needs a batch of at least two: a size of one would be taken for a constant")
    try:
        program = _program(model, fresh(args), fresh(kwargs), dynamic_size)
    except Exception as error:  # whatever a model's own code leads torch.export to
        raise UnsupportedModelError((f"{name}: torch.export cannot follow it: {one_line(error)}",)) from error
    larger = tree_map(lambda x: _larger(x, dynamic_size) if _has_batch(x) else x, (args, kwargs))
    args, kwargs = fresh(larger)
    with module_stack(model) as stack, NormSpy(tensors((args, kwargs)), stack) as spy:
        expected = [y.double() for y in tensors(model(*args, **kwargs))]
    plan, norms = plan_on(model), list(dict.fromkeys(spy.seen))
    if norms and not (plan and any(edit.action == "keep" for edit in plan.norms)):
        raise UnsupportedModelError((f"{name}: batch norms run in the exported program: {some(norms)}",))
    with replacing(out) as temporary:
        run = (_write_onnx if chosen == "onnx" else _write_pt2)(program, temporary)
        args, kwargs = fresh(larger)
        difference = error_between(expected, run(*args, **kwargs))
        if difference > TOLERANCE:
            raise UnsupportedModelError((f"{name}: the {chosen} program's output differs by {difference:.1e}",))
    return difference


def own_input(model: nn.Module, shape: tuple[int, ...] | None = None) -> Inputs:
    """Return a batch of two, of white noise, of the size that a model was made for.

    Args:
        model: The model.
        shape: That size, ``(C, *)``, if it is known.

    Raises:
        UsageError: Nothing says it. Many networks would take any size, but their program is for one.
    """
    shape = zoo.own_shape(model) if shape is None else shape
    if shape is None:
        if not any(hasattr(module, "kernel_size") for module in model.modules()):
            return example_input(model)  # of linear layers alone: they take one size only
        raise UsageError(
            f"nothing says which size this {type(model).__name__} was made for, and its program will be for one: pass "
            "inputs= (--size)"
        )
    like = next(model.parameters())
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return noise.to(like.device, like.dtype)


def format_of(path: str | Path, format: str | None) -> Format:
    """Return the format that a file has by its ending; packages that it needs are there.

    Raises:
        UsageError: It is none, is not the one that is asked for, or a package is missing.
    """
    ending = Path(path).suffix.removeprefix(".")
    if ending not in ("pt2", "onnx") or format not in (None, ending):
        raise UsageError(f"{path}: the name of a program ends in .{format or 'pt2 or .onnx'}")
    for package in ("onnxscript", "onnxruntime") if ending == "onnx" else ():
        require(package, "export")
    return cast(Format, ending)


def _has_batch(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0


def _larger(x: Tensor, dynamic_size: bool) -> Tensor:
    """Return one more sample, and a larger image where the program takes any."""
    x = torch.cat([x, x[:1]])
    return torch.cat([x, x], dim=3) if dynamic_size and x.dim() == 4 else x


def _program(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_size: bool
) -> torch.export.ExportedProgram:
    shapes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]  # torch's own
    for x in filter(_has_batch, tree_leaves((args, kwargs))):
        free = (0, 2, 3) if dynamic_size and x.dim() == 4 else (0,)
        shapes[x] = dict.fromkeys(free, torch.export.Dim.DYNAMIC)
    return torch.export.export(model, args, kwargs, dynamic_shapes=shapes.dynamic_shapes(model, args, kwargs))


Run = Callable[..., list[Tensor]]


def _write_pt2(program: torch.export.ExportedProgram, path: Path) -> Run:
    with path.open("wb") as file:
        torch.export.save(program, file)
    module = program.module()
    return lambda *args, **kwargs: tensors(module(*args, **kwargs))


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> Run:
    import onnxruntime

    given, returned = program.graph_signature.user_inputs, program.graph_signature.user_outputs
    made = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=["input"] if len(given) == 1 else [str(name) for name in given],
        output_names=["output"] if len(returned) == 1 else [f"output_{i}" for i in range(len(returned))],
    )
    if made is None:
        raise UnsupportedModelError(("torch.onnx.export returned nothing",))
    _name_dimensions(made.model.graph)
    made.save(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        given = [x.numpy() for x in tensors((args, kwargs))]
        return [torch.from_numpy(y) for y in session.run(None, dict(zip(names, given, strict=True)))]

    return run


def _name_dimensions(graph: Any) -> None:
    """Call the dimensions that are free what they are, wherever they stand by themselves."""
    names: dict[str, str] = {}
    for value in graph.inputs:
        for what, dim in zip(("batch", "channels", "height", "width"), value.shape, strict=False):
            if not isinstance(dim, int):
                names.setdefault(str(dim), what)
    nodes = (output for node in graph.all_nodes() for output in node.outputs)
    for value in (*graph.inputs, *nodes):
        if value.shape is not None:
            dims = [names.get(str(dim), dim) for dim in value.shape]
            value.shape = type(value.shape)(dims)
