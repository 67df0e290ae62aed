"""Random networks that broke a promise once: as the property test printed them, with what they were about."""

from __future__ import annotations

import pytest
from harness import both
from random_blocks import Again, Graph, Nest, Res, Wire, Wrap
from random_layers import Act, Conv, Drop, Norm
from random_networks import Network
from test_random_networks import Init, hold, trains

BRANCH = (Conv(), Norm(), Conv(out=8), Norm(), Act(what="silu"))
PINNED = {
    "an untraceable module calls the norm by another name": Network(body=(Conv(), Norm(), Wrap(layers=(Again(),)))),
    "an untraceable module calls the layer by another name": Network(body=(Conv(), Norm(), Wrap(layers=(Again(1),)))),
    "a root asks for its mode, and something in it for the class of a norm": Network(
        body=(Wrap(layers=(Nest(layers=(Norm(),), how="untold"),)),), outputs="auxiliary"
    ),
    "a branch is written over once it has been added": Network(
        body=(
            Graph(
                wires=(
                    Wire(layers=(Graph(wires=(Wire(layers=(Drop(),), join="cat"),)),)),
                    Wire(layers=(Res(branch=BRANCH, how="add_", nested=False),), join="plus", other=1),
                )
            ),
        )
    ),
}


@both
@pytest.mark.parametrize("about", PINNED)
def test_network_that_broke_a_promise_keeps_it(about: str, init: Init) -> None:
    assert trains(PINNED[about])
    hold(PINNED[about], init)
