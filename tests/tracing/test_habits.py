"""How people write residual blocks: every one of these is one sum with one scalar, however it is spelled."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import Block, assert_preserved, both, noise, prove, randomise, set_alphas
from readings import alphas, kinds, norms, plan_of
from torch import Tensor, nn

import normfree

X = noise(2, 3, 8, 8)


class Branch(nn.Sequential):
    def __init__(self, out: int = 4, stride: int = 1) -> None:
        first = nn.Conv2d(4, out, 3, stride, 1, bias=False)
        super().__init__(first, nn.BatchNorm2d(out), nn.ReLU(), nn.Conv2d(out, out, 1, bias=False), nn.BatchNorm2d(out))


class Written(nn.Module):
    """A block whose forward is given."""

    def __init__(self, how: Callable[[Any, Tensor], Tensor], out: int = 4, stride: int = 1) -> None:
        super().__init__()
        self.f, self.how, self.mine = Branch(out, stride), how, Mine()

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


class Mine(nn.Module):
    """An identity of one's own."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def net(block: nn.Module, head: nn.Module | None = None) -> nn.Module:
    return randomise(nn.Sequential(nn.Conv2d(3, 4, 1), block, head or nn.ReLU()))


def _sizes(self: Any, x: Tensor) -> Tensor:
    y = self.f(x)
    if x.size() != y.size():
        x = F.interpolate(x, y.shape[2:])
    return x + y if len(x.shape) == 4 and x.dim() == 4 and int(x.shape[3]) > 0 else y


def _detected(self: Any, x: Tensor) -> Tensor:
    scale = torch.as_tensor(1.0, device=x.device)
    return x + self.f(x) * scale if not torch.jit.is_scripting() else x


SAME: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "sizes are compared": _sizes,
    "a device is asked": _detected,
    "clone": lambda self, x: x.clone() + self.f(x),
    "detach": lambda self, x: self.f(x) + x.detach(),
    "float": lambda self, x: x.float() + self.f(x),
    "to": lambda self, x: x.to(torch.float32) + self.f(x),
    "to a device": lambda self, x: x.to("cpu") + self.f(x),
    "as_tensor": lambda self, x: self.f(x) + torch.as_tensor(x),
    "type_as": lambda self, x: self.f(x) + x.type_as(x),
    "an identity of one's own": lambda self, x: self.mine(x) + self.f(x),
    "built-in sum": lambda self, x: sum([x, self.f(x)]),
    "stack": lambda self, x: torch.stack([x, self.f(x)]).sum(0),
    "sum by keyword": lambda self, x: torch.add(self.f(x), other=x),
    "sum with a product": lambda self, x: torch.addcmul(x, torch.ones(4, 1, 1), self.f(x)),
    "sum with a product in place": lambda self, x: x.clone().addcmul_(self.f(x), torch.ones(1), value=0.5),
    "stack by keyword": lambda self, x: torch.stack([x, self.f(x)], dim=1).sum(dim=1),
    "joined along a new dimension": lambda self, x: torch.cat([x[None], self.f(x)[None]]).sum(0),
    "joined and folded": lambda self, x: torch.cat([x, self.f(x)], 1).unflatten(1, (2, 4)).sum(1),
    "joined along the batch": lambda self, x: torch.cat([self.f(x), x]).view(2, *x.shape).sum(0, keepdim=True)[0],
    "joined and cut in two": lambda self, x: sum(torch.cat([x, self.f(x)], 1).chunk(2, 1)),
    "stack taken apart": lambda self, x: sum(torch.stack([x, self.f(x)]).unbind()),
    "stack added up step by step": lambda self, x: torch.stack([x, self.f(x)]).cumsum(0)[-1],
    "stack with a constant": lambda self, x: (torch.stack([x, self.f(x)]) + 0).permute(1, 2, 3, 4, 0).sum(-1),
    "stack in an einsum": lambda self, x: torch.einsum("kbchw,k->bchw", torch.stack([x, self.f(x)]), torch.ones(2)),
    "stack by a matrix": lambda self, x: (torch.stack([x, self.f(x)], -1) @ torch.ones(2, 1))[..., 0],
    "by index": lambda self, x: x.index_add(0, torch.arange(len(x)), self.f(x)),
    "minus its negative": lambda self, x: x - (-self.f(x)),
}


def _through_a_view(x: Tensor, y: Tensor) -> Tensor:
    whole = torch.zeros(len(x) + 1, *x.shape[1:])
    whole[:-1].copy_(y)
    return x + whole[:-1]


@both
@pytest.mark.parametrize("how", SAME)
def test_residual_sum_in_other_words(how: str, init: str) -> None:
    converted = prove(net(Written(SAME[how])), X.clone(), init=init)
    plan = plan_of(converted)
    assert (kinds(converted), alphas(converted), plan.declined) == (["residual"], ["1.f.3"], ())
    assert norms(converted) == []
    set_alphas(converted, 0.0).eval()
    assert torch.equal(converted(X), torch.relu(converted[0](X)))


@both
def test_branch_that_is_written_through_a_view_is_seen(init: str) -> None:
    converted = prove(net(Written(lambda self, x: _through_a_view(x, self.f(x)))), X, init=init)
    assert kinds(converted) == ["residual"]
    assert "which no module of its own returns" in plan_of(converted).declined[0]


@both
def test_difference_is_a_residual_sum(init: str) -> None:
    converted = prove(net(Written(lambda self, x: x - self.f(x))), X, init=init)
    assert [(total.name, total.kind) for total in plan_of(converted).sums] == [("1.sub", "residual")]
    assert alphas(converted) == ["1.f.3"]


@both
def test_mean_with_weights_is_a_residual_sum(init: str) -> None:
    converted = prove(net(Written(lambda self, x: torch.lerp(x, self.f(x), 0.25))), X, init=init)
    assert [(total.name, total.kind) for total in plan_of(converted).sums] == [("1.lerp", "residual")]
    set_alphas(converted, 0.0).eval()
    assert torch.allclose(converted(X), torch.relu(0.75 * converted[0](X)))


@both
def test_mean_of_a_stack_is_a_residual_sum(init: str) -> None:
    converted = prove(net(Written(lambda self, x: torch.stack([x, self.f(x)]).mean(0))), X, init=init)
    assert (kinds(converted), alphas(converted)) == (["residual"], ["1.f.3"])
    set_alphas(converted, 0.0).eval()
    assert torch.equal(converted(X), torch.relu(converted[0](X) / 2))


@both
@pytest.mark.parametrize("how", ["maximum", "squares", "any", "shuffled"])
def test_join_that_is_not_added_is_no_sum(how: str, init: str) -> None:
    made: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "maximum": lambda self, x: torch.stack([x, self.f(x)]).amax(0),
        "any": lambda self, x: torch.stack([x, self.f(x)]).gt(0).any(0) * x,
        "squares": lambda self, x: torch.stack([x, self.f(x)]).square().sum(0),
        "shuffled": lambda self, x: (
            torch.cat([x, self.f(x)], 1).unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2)[:, :4]
        ),
    }
    assert plan_of(prove(net(Written(made[how])), X, init=init)).sums == ()


@both
def test_stack_that_the_input_weighs_is_listed(init: str) -> None:
    def weighed(self: Any, x: Tensor) -> Tensor:
        both = torch.stack([x, self.f(x)], 1)
        return (both * both.mean((3, 4), keepdim=True).softmax(1)).sum(1)

    plan = plan_of(prove(net(Written(weighed)), X, init=init))
    assert [(total.kind, total.reason) for total in plan.sums] == [
        ("merge", "the input decides how much of each goes into it")
    ]


@both
def test_sum_with_a_product_of_matrices_is_a_residual_sum(init: str) -> None:
    mixed = torch.eye(64).repeat(2, 1, 1)
    rows = Written(lambda self, x: torch.baddbmm(x.flatten(2), self.f(x).flatten(2), mixed.to(x)))
    converted = prove(net(rows), X, init=init)
    assert kinds(converted) == ["residual"]
    assert "which no module of its own returns" in plan_of(converted).declined[0]


class Part(nn.Module):
    """Adds to a part of the channels, which it takes twice, or adds one part to what comes of the other."""

    def __init__(self, other: bool) -> None:
        super().__init__()
        self.f, self.start = Branch(2), 2 if other else 0
        self.f[0] = nn.Conv2d(2, 2, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :2] + self.f(x[:, self.start : self.start + 2]), x[:, 2:]], 1)


@both
@pytest.mark.parametrize("other", [False, True], ids=["same part", "other part"])
def test_sum_of_a_part_is_residual_where_the_branch_takes_the_same(other: bool, init: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Part(other), nn.ReLU())
    converted = prove(randomise(model), X, init=init)
    assert kinds(converted) == ["merge" if other else "residual"]
    assert alphas(converted) == ([] if other else ["2.f.3"])


@both
def test_mean_whose_weights_the_input_sets_is_listed(init: str) -> None:
    gated = Written(lambda self, x: torch.lerp(x, self.f(x), torch.sigmoid(x.mean((2, 3), keepdim=True))))
    plan = plan_of(prove(net(gated), X, init=init))
    assert [(total.kind, total.reason) for total in plan.sums] == [
        ("merge", "the input decides how much of each goes into it")
    ]


@both
@pytest.mark.parametrize("how", ["f(x) - x", "less its mean", "less a mean of features"])
def test_difference_that_takes_no_branch_away_is_none(how: str, init: str) -> None:
    taken: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "f(x) - x": lambda self, x: self.f(x) - x,
        "less its mean": lambda self, x: self.f(x - x.mean(1, True)),
        "less a mean of features": lambda self, x: x - self.f(x).mean((2, 3), True),
    }
    assert plan_of(prove(net(Written(taken[how])), X, init=init)).sums == ()


def _twice(self: Any, x: Tensor) -> Tensor:
    return x[:, :, ::2, ::2]


def fused(x: Tensor, y: Tensor) -> Tensor:
    return torch.relu(x + y)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch has put TorchScript away; models still hold it
    scripted = torch.jit.script(fused)


@torch.library.custom_op("normfree_tests::joined", mutates_args=())
def joined(x: Tensor, y: Tensor) -> Tensor:
    return torch.relu(x + y)


@joined.register_fake
def _(x: Tensor, _: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("normfree_tests::chosen", mutates_args=())
def chosen(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x, y)


@chosen.register_fake
def _(x: Tensor, _: Tensor) -> Tensor:
    return torch.empty_like(x)


class Marked(Tensor):
    """A subclass of one's own."""


def _inference(self: Any, x: Tensor) -> Tensor:
    with torch.inference_mode(not self.training):
        return (x + self.f(x)).clone()


ELSEWHERE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "in TorchScript": lambda self, x: scripted(x, self.f(x)),
    "operator of one's own": lambda self, x: torch.ops.normfree_tests.joined(x, self.f(x)),
    "subclass of Tensor": lambda self, x: (x.as_subclass(Marked) + self.f(x)).as_subclass(Tensor),
    "inference mode": _inference,
}


@pytest.mark.parametrize("how", ELSEWHERE)
def test_sum_in_code_that_torch_does_not_tell_of(how: str) -> None:
    plan = normfree.plan(net(Written(ELSEWHERE[how])), init="preserve", inputs=X)
    assert ([total.kind for total in plan.sums], [alpha.path for alpha in plan.alphas]) == (["residual"], ["1.f.4"])
    assert plan.opaque == ()


def test_operator_that_may_add_is_listed() -> None:
    model = net(Written(lambda self, x: torch.ops.normfree_tests.chosen(x, self.f(x))))
    reasons = [total.reason for total in normfree.plan(model, init="preserve", inputs=X).sums]
    assert reasons == ["an operator of somebody's own makes one of two, and does not say whether it adds them"]


def test_what_another_thread_computes_is_said_to_be_unseen() -> None:
    def threaded(self: Any, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: x + self.f(x)).result()

    plan = normfree.plan(net(Written(threaded), Block()), init="preserve", inputs=X)
    assert len(plan.alphas) == 1
    assert plan.opaque[0][0] == "the root"
    assert "the root computes something in code that cannot be seen (a thread, NumPy, an extension)" in str(plan)


def test_forward_that_copies_its_block_comes_to_an_end() -> None:
    model = net(Written(lambda self, x: x + copy.deepcopy(self.f)(x)))
    assert len(normfree.plan(model, init="preserve", inputs=X).alphas) == 1


PADDED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "zeros of shapes": lambda self, x: torch.cat([_twice(self, x), torch.zeros(len(x), 4, *self.f(x).shape[2:])], 1),
    "zeros_like": lambda self, x: torch.cat([_twice(self, x), torch.zeros_like(_twice(self, x))], 1),
    "times zero": lambda self, x: torch.cat([_twice(self, x), _twice(self, x).mul(0)], 1),
    "repeat": lambda self, x: _twice(self, x).repeat(1, 2, 1, 1),
    "pad": lambda self, x: F.pad(_twice(self, x), (0, 0, 0, 0, 2, 2)),
    "assigned": lambda self, x: _assigned(_twice(self, x)),
}


def _assigned(x: Tensor) -> Tensor:
    wide = x.new_zeros(len(x), 8, *x.shape[2:])
    wide[:, :4] = x
    return wide


@both
@pytest.mark.parametrize("how", PADDED)
def test_shortcut_with_more_channels_and_no_layer(how: str, init: str) -> None:
    block = Written(lambda self, x: PADDED[how](self, x) + self.f(x), out=8, stride=2)
    converted = prove(net(block), X, init=init)
    assert kinds(converted)[-1] == "residual"
    assert alphas(converted) == (["1.f.3"] if how != "zeros of shapes" else alphas(converted))
    assert plan_of(converted).opaque == ()


class Fusion(nn.Module):
    """A decoder's block with an optional second input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Branch(), Branch()

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        if other is not None:
            x = x + (other + self.one(other))
        return x + self.two(x)


class Fusing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 4, 1), nn.ModuleList(Fusion() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x, fused = self.stem(x), None
        for i, block in enumerate(self.blocks):
            features = F.avg_pool2d(x, 2 ** (2 - i))
            fused = block(features) if fused is None else block(F.interpolate(fused, scale_factor=2.0), features)
        return fused


@both
def test_block_with_an_optional_input_with_and_without_it(init: str) -> None:
    model = randomise(Fusing())
    model.blocks[0].one = nn.Identity()
    converted = prove(model, X, init=init)
    assert plan_of(converted).declined == ()
    assert alphas(converted) == ["blocks.0.two.3", *(f"blocks.{i}.{part}.3" for i in (1, 2) for part in ("one", "two"))]


class MoreInTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 4, 1), Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        return self.block(x) if self.training else x


@both
def test_block_called_once_in_evaluation_and_twice_in_training(init: str) -> None:
    converted = prove(randomise(MoreInTraining()), X, init=init)
    assert alphas(converted) == ["block.conv2" if init == "skipinit" else "block.bn2"]
    assert plan_of(converted).declined == ()


class Tapped(nn.Module):
    """Hangs hooks on its layers in its forward, returns what they saw, and takes them off again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 4, 1), Block()

    def forward(self, x: Tensor) -> list[Tensor]:
        seen: list[Tensor] = []
        handle = self.block.register_forward_hook(lambda _, __, out: seen.append(out))
        self.block(self.stem(x))
        handle.remove()
        return [2 * tensor for tensor in seen]


@both
def test_hooks_that_a_forward_installs_run(init: str) -> None:
    converted = prove(randomise(Tapped()), X, init=init)
    assert alphas(converted) == ["block.conv2"]
    assert not converted.block._forward_hooks


def test_a_users_hooks_do_not_run_and_stay() -> None:
    model, seen = net(Block()), []
    model[1].register_forward_hook(lambda _, __, out: seen.append(out))
    normfree.plan(model, init="skipinit")
    assert seen == []
    assert len(model[1]._forward_hooks) == 1


@both
def test_hooks_that_may_add_are_named(init: str) -> None:
    model = net(Branch(), nn.Sequential(Branch(), nn.ReLU()))
    model[1].register_forward_hook(lambda _, given, out: out + given[0])
    model[2].register_forward_pre_hook(lambda _, __: None)
    plan = plan_of(prove(model, X, init=init))
    assert plan.sums == ()
    assert plan.opaque == (("1", "a hook on 1 is not run; sums that it makes get no scalar"),)
    assert "not seen: a hook on 1 is not run" in str(plan)


class Keeping(nn.Module):
    """Keeps its activations in a list and in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.kept = nn.Conv2d(3, 4, 1), Block(), {"all": [noise(1)]}

    def forward(self, x: Tensor) -> Tensor:
        self.kept["all"].append(self.stem(x))
        return self.block(self.kept["all"][-1])


@both
def test_activation_in_a_list_of_the_model(init: str) -> None:
    model = randomise(Keeping())
    model(X)
    before = list(model.kept["all"])
    assert before[-1].grad_fn is not None
    assert len(normfree.plan(model, init=init).alphas) == 1
    assert all(one is other for one, other in zip(model.kept["all"], before, strict=True))
    assert norms(normfree.convert(model, init=init)) == []
    assert norms(normfree.convert_(model, init=init)) == []


class Reversible(nn.Module):
    """Takes the mean off in front and adds it again at the end, as forecasters do."""

    def __init__(self, repeated: bool) -> None:
        super().__init__()
        self.repeated = repeated
        self.body = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        y = self.body((x - mean) / deviation)
        if self.repeated:
            return y * deviation.repeat(1, 1, y.shape[-1]) + mean[:, :, 0].unsqueeze(-1).repeat(1, 1, y.shape[-1])
        return y * deviation + mean


@both
@pytest.mark.parametrize("repeated", [False, True])
def test_mean_that_is_added_back_is_no_skip_path(repeated: bool, init: str) -> None:
    converted = prove(randomise(Reversible(repeated)), noise(2, 3, 12), init=init)
    assert kinds(converted) == ["merge"]
    assert alphas(converted) == []


DRAWS: dict[str, Callable[[], float]] = {
    "random": random.random,
    "uniform": lambda: random.uniform(0, 1),  # noqa: S311  # no secret
    "numpy": np.random.rand,
    "torch": lambda: float(torch.rand(())),
}


@both
@pytest.mark.parametrize("how", DRAWS)
def test_stochastic_depth_by_hand_hides_no_block(how: str, init: str) -> None:
    def dropped(self: Any, x: Tensor) -> Tensor:
        return x if self.training and DRAWS[how]() < 0.2 else x + self.f(x)

    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), *(Written(dropped) for _ in range(4))))
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    plan = normfree.plan(model, init=init)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert len(plan.alphas) == 4
    assert_preserved(model.eval(), X)


class Inner(nn.Module):
    """Holds nothing of interest, and something that a hook listens to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class Listening(nn.Module):
    """Takes a feature out of the middle of a layer by a hook that it installs once."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.block, self.seen = nn.Conv2d(3, 4, 1), Inner(), Block(), {}

    def forward(self, x: Tensor) -> Tensor:
        if not self.seen:
            self.inner.first.register_forward_hook(lambda _, __, out: self.seen.update(first=out))
        self.inner(self.stem(x))
        return self.block(self.seen["first"])


@both
def test_feature_from_inside_of_a_layer_is_not_lost(init: str) -> None:
    plan = normfree.plan(randomise(Listening()), init=init, inputs=X)
    assert [edit.action for edit in plan.norms] == ["fold", "fold"]
    assert [total.kind for total in plan.sums] == ["residual"]
    assert len(plan.alphas) == 1


class Mixing(nn.Module):
    """Mixes tokens, and hands on what it weighed them by."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scores = self.scores(x) if before is None else self.scores(x) + before
        return self.out(torch.sigmoid(scores) * x), scores


class Attending(nn.Module):
    """Takes the scores of the block before it: its forward is rewritten for nobody, and its branch ends in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.dropped, self.norm = Mixing(), nn.Dropout(0.1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, before = self.mix(x, before)
        return self.norm(x + self.dropped(y)), before


class Chained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 4, 1), nn.ModuleList(Attending() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x, scores = self.stem(x), None
        for block in self.blocks:
            x, scores = block(x, scores)
        return x


@both
def test_dropout_is_the_last_place_of_a_scalar(init: str) -> None:
    converted = prove(randomise(Chained()), X, init=init)
    assert alphas(converted) == ["blocks.0.skipinit_0", "blocks.1.dropped"]
    assert plan_of(converted).declined == ()


def _by_lambdas(model: Any) -> None:
    model.steps = [lambda x: x + model.one(x), lambda x, other=model.other: x + other(x)]


def _by_functions(model: Any) -> None:
    one, others = model.one, {"other": model.other}

    def second(x: Tensor) -> Tensor:
        return x + others["other"](x)

    model.steps = (lambda x: second(x + one(x)),)


def _by_partials(model: Any) -> None:
    def step(block: nn.Module, x: Tensor) -> Tensor:
        return x + block(x)

    model.steps = [partial(step, model.one), partial(lambda x: step(model.other, x))]


class Stepping(nn.Module):
    """Holds functions that call its modules: what torch copies of them would go on calling those of the original."""

    def __init__(self, held: Callable[[Any], None]) -> None:
        super().__init__()
        self.stem, self.one, self.other = nn.Conv2d(3, 4, 1), Branch(), Branch()
        held(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for step in self.steps:
            x = step(x)
        return x


@both
@pytest.mark.parametrize("held", [_by_lambdas, _by_functions, _by_partials])
def test_functions_that_a_model_holds_call_the_layers_of_its_copy(held: Callable[[Any], None], init: str) -> None:
    model = randomise(Stepping(held))
    converted = prove(model, X, init=init)
    assert (kinds(converted), alphas(converted)) == (["residual"] * 2, ["one.3", "other.3"])
    assert norms(converted) == []
    before = model.eval()(X)
    nn.init.zeros_(converted.one[0].weight)
    assert torch.equal(model(X), before)
    normfree.convert_(model, init=init)
    assert norms(model) == []
    assert init == "skipinit" or torch.allclose(model(X), before, atol=1e-5)
