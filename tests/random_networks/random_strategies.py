"""How hypothesis draws the description of a network: mostly what people write, sometimes what nobody would."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from random_blocks import Again, Graph, Nest, Res, UNet, Ways, Wire, Wrap
from random_functions import FUNCTIONS, JOINS
from random_layers import Act, Conv, Drop, Excite, Mix, Norm, Pool
from random_networks import Network

Layers = st.SearchStrategy[tuple[Any, ...]]


def often(usual: str, *others: str) -> st.SearchStrategy[str]:
    """Draw the usual value in half of the cases; shrink to it."""
    return st.one_of(st.just(usual), st.sampled_from((usual, *others)))


def seldom() -> st.SearchStrategy[bool]:
    """Return true in one of nine cases."""
    return st.integers(0, 8).map(lambda n: n == 8)


def convs() -> st.SearchStrategy[Conv]:
    return st.builds(
        Conv,
        out=st.sampled_from([4, 6, 8]),
        kernel=st.sampled_from([1, 3]),
        stride=st.sampled_from([1, 1, 1, 2]),
        dilation=st.sampled_from([1, 1, 2]),
        groups=st.sampled_from([1, 1, 2, 4]),
        bias=st.booleans(),
        kind=often(
            "plain",
            *("transposed", "own_forward", "subclass", "standardised", "weight_norm", "parametrised"),
            *("circular", "replicate"),
        ),
        frozen=seldom(),
        hooked=seldom(),
    )


def norms() -> st.SearchStrategy[Norm]:
    timm = ("timm", "timm_silu", "timm_plain", "timm_drop", "timm_frozen")
    kind = often("plain", "no_affine", "no_bias", "cumulative", "large_eps", "torchvision", *timm)
    return st.builds(Norm, kind=kind, frozen=seldom(), evaluating=seldom(), hooked=seldom())


def acts() -> st.SearchStrategy[Act]:
    hows = ("module_in_place", "function", "in_place", "method")
    return st.builds(Act, what=often("relu", *FUNCTIONS, "prelu"), how=often("module", *hows))


def drops() -> st.SearchStrategy[Drop]:
    hows = ("Dropout", "Dropout_in_place", "DropoutNd", "StochasticDepth", "DropPath")
    return st.builds(
        Drop, st.sampled_from((*hows, "dropout", "dropout_in_place", "depth", "drop_path", "drop_path_any"))
    )


def units(depth: int) -> Layers:
    """Draw a few layers that go together, or one composite."""
    single = st.one_of(
        convs(),
        acts(),
        drops(),
        norms(),
        st.builds(Excite, inline=st.booleans(), normed=st.booleans()),
        st.builds(Pool, st.sampled_from(["avg_same", "avg", "max", "blur", "up", "identity"])),
        st.builds(Mix, st.booleans()),
        st.builds(Again, st.integers(0, 7)),
    )
    usual = st.one_of(
        st.tuples(convs(), norms()),
        st.tuples(convs(), norms(), acts()),
        st.tuples(norms(), acts(), convs()),
        single.map(lambda layer: (layer,)),
    )
    if depth == 0:
        return usual
    return st.one_of(usual, composites(depth - 1).map(lambda layer: (layer,)))


def layers(depth: int, most: int = 3) -> Layers:
    return st.lists(units(depth), min_size=1, max_size=most).map(lambda found: sum(found, ()))


def residuals(depth: int) -> st.SearchStrategy[Res]:
    hows = [how for how in JOINS if how not in ("cat", "times")]
    return st.builds(
        Res,
        branch=layers(depth),
        first=st.one_of(st.just(()), st.tuples(norms(), acts())),
        post=st.one_of(st.just(()), st.tuples(acts())),
        skip=often("identity", "pool", "max", "conv", "norm", "conv_norm", "pool_conv_norm", "blur_conv_norm", "pad"),
        how=often("plus", *hows),
        nested=st.booleans(),
        skip_first=st.booleans(),
        preactivated=st.booleans(),
    )


def wires(depth: int) -> st.SearchStrategy[Wire]:
    joins = st.one_of(st.none(), st.sampled_from(["plus", "plus", "cat", *JOINS]))
    return st.builds(Wire, layers(depth, 2), st.integers(0, 3), joins, st.integers(0, 3))


def parallels(depth: int) -> st.SearchStrategy[Graph]:
    """Draw branches of one input that are added up, as in RepVGG."""
    branch = st.one_of(st.tuples(norms()), st.tuples(convs(), norms()), layers(depth, 1))
    rest = st.lists(branch, min_size=1, max_size=2)
    first = st.builds(Wire, branch)

    def joined(first: Wire, rest: list[tuple[Any, ...]]) -> Graph:
        return Graph((first, *(Wire(branch, 0, "plus", i + 1) for i, branch in enumerate(rest))))

    return st.builds(joined, first, rest)


def denses(depth: int) -> st.SearchStrategy[Graph]:
    """Draw concatenations with everything before, as in DenseNet."""
    found = st.lists(layers(depth, 1), min_size=1, max_size=3)
    return found.map(lambda many: Graph(tuple(Wire(inner, i, "cat", i) for i, inner in enumerate(many))))


def composites(depth: int) -> st.SearchStrategy[Any]:
    inner = layers(depth, 2)
    ways = st.sampled_from(["split", "chunk", "add_slice", "iadd_slice"])
    return st.one_of(
        residuals(depth),
        residuals(depth),
        st.builds(Graph, st.lists(wires(depth), min_size=1, max_size=4).map(tuple)),
        parallels(depth),
        denses(depth),
        st.builds(UNet, inner, st.sampled_from(["plus", "cat", "iadd", "times"]), st.booleans()),
        st.builds(Ways, inner, ways),
        st.builds(Wrap, inner, st.sampled_from(["shape", "data", "loop", "checkpoint"])),
        st.builds(Nest, inner, st.sampled_from(["sequential", "attributes", "untold"])),
    )


def networks() -> st.SearchStrategy[Network]:
    """Draw a whole network: one in ten cannot be converted."""
    return st.builds(
        Network,
        body=st.lists(units(2), min_size=1, max_size=4).map(lambda found: sum(found, ())),
        dims=st.sampled_from([2, 2, 1, 3]),
        how=often("sequential", "attributes", "untold"),
        head=often("none", "linear", "norm", "norm_flatten", "norm_view"),
        outputs=often("one", "tuple", "dict", "auxiliary"),
        wrap=st.sampled_from([None] * 6 + ["shape", "data", "loop", "checkpoint"]),
        special=st.integers(0, 29).map({27: "stateless", 28: "functional", 29: "hidden"}.get),
        p=st.sampled_from([0.25, 0.5]),
        seed=st.integers(0, 3),
    )
