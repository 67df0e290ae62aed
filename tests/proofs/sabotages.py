"""What a wrong conversion, or a later hand, could do to a converted model: the table, and the network it is done to."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import Gated, randomise
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

import normfree
from normfree.layers import ChannelAffine

Sabotage = Callable[[Any], None]
BOTH, SKIPINIT, PRESERVE = ("skipinit", "preserve"), ("skipinit",), ("preserve",)


class Post(nn.Module):
    """A block that adds first and activates then, with a projection and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.drop = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.Dropout(0.2)
        self.conv2, self.bn2 = nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.down = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.drop(self.act(self.bn1(self.conv1(x))))))
        return self.act(y + self.down(x))


class Pre(nn.Module):
    """A block that normalises and activates first."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.act1, self.act2 = nn.ReLU(inplace=True), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.act2(self.bn2(self.conv1(self.act1(self.bn1(x))))))


class Squeezed(nn.Module):
    """A block whose branch ends in a module that no weight ends, with a dropout by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.p = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), 0.1
        self.end = SqueezeExcitation(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.end(F.dropout(torch.relu(self.bn(self.conv(x))), self.p, self.training))


class Net(nn.Module):
    """Every place that alpha lives in, a frozen layer, two heads with one weight, a hook, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.post, self.pre, self.gated, self.end = Post(), Pre(), Gated(), Squeezed()
        self.fc, self.aux = nn.Linear(4, 3), nn.Linear(4, 3)
        self.aux.weight = self.fc.weight
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.end(self.gated(self.pre(self.post(self.stem(x))))) * self.scale
        y = y.mean((2, 3))
        return self.fc(y), self.aux(y)


def brighten(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    """Change what a layer returns: a hook of the user's."""
    return out * 1.25


def make() -> Net:
    """Return the network as a user has it."""
    model = randomise(Net())
    model.aux.bias.requires_grad_(False)
    model.stem.register_forward_hook(brighten)
    return model


TABLE: dict[str, tuple[tuple[str, ...], Sabotage]] = {}


def sabotage(*inits: str) -> Callable[[Sabotage], Sabotage]:
    def add(do: Sabotage) -> Sabotage:
        TABLE[do.__name__] = (inits or BOTH, do)
        return do

    return add


def over(module: nn.Module, change: Callable[[nn.Module, Any, Tensor], Tensor]) -> None:
    """Derive a class from a module's own that changes what it returns, given the module and its input."""
    base: Any = type(module)

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return change(self, x, base.forward(self, x))

    module.__class__ = type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})


def hooked(module: nn.Module, change: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """Change what a module returns, by a hook."""
    module.register_forward_hook(lambda m, _, out: change(m, out))


def patched(module: nn.Module, forward: Callable[[Any, Tensor], Any]) -> None:
    """Put a forward on an instance."""
    module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]


def roll(x: Tensor) -> Tensor:
    return x.roll(1, 0)


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True) + 1e-5).sqrt()


# The batch -----------------------------------------------------------------------------------------------------------


@sabotage()
def roll_inside_a_branch(m: Any) -> None:
    over(m.post.conv1, lambda _, x, y: roll(y))


@sabotage()
def roll_inside_a_branch_by_a_hook(m: Any) -> None:
    hooked(m.pre.conv1, lambda _, y: roll(y))


@sabotage()
def roll_inside_a_branch_in_train_mode(m: Any) -> None:
    hooked(m.post.bn1, lambda own, y: roll(y) if own.training else y)


@sabotage()
def roll_what_a_branch_returns(m: Any) -> None:
    hooked(m.post.conv2, lambda _, y: roll(y))


@sabotage()
def roll_inside_a_block_with_a_forward_of_its_own(m: Any) -> None:
    over(m.gated.fc, lambda _, x, y: roll(y))


@sabotage()
def mean_of_the_batch_taken_off_in_train_mode(m: Any) -> None:
    hooked(m.post.conv2, lambda own, y: y - y.mean(0, keepdim=True) if own.training else y)


@sabotage()
def largest_of_the_batch(m: Any) -> None:
    hooked(m.end.conv, lambda _, y: y / y.abs().amax().clamp_min(1e-3))


@sabotage()
def standardised_by_hand_in_train_mode(m: Any) -> None:
    hooked(m.post.bn1, lambda own, y: standardised(y) if own.training else y)


@sabotage()
def standardised_by_hand_in_both_modes(m: Any) -> None:
    over(m.stem[1], lambda _, x, y: standardised(y))


@sabotage()
def samples_sorted(m: Any) -> None:
    hooked(m.pre.bn2, lambda _, y: y.sort(0).values)


@sabotage()
def neighbour_leaks_a_little(m: Any) -> None:
    hooked(m.gated.conv, lambda _, y: y + 1e-4 * roll(y))


# Norms smuggled back -------------------------------------------------------------------------------------------------


class Own(nn.Module):
    """A norm that is not called one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.lerp_(x.detach().mean((0, 2, 3)), 0.1)
        return x - self.seen[:, None, None]


@sabotage()
def batch_norm_back_in_its_slot(m: Any) -> None:
    m.post.bn1 = nn.BatchNorm2d(6)


@sabotage()
def functional_batch_norm_in_train_mode(m: Any) -> None:
    hooked(m.post.bn1, lambda own, y: F.batch_norm(y, None, None, training=True) if own.training else y)


@sabotage()
def functional_batch_norm_with_statistics(m: Any) -> None:
    hooked(m.post.bn2, lambda _, y: F.batch_norm(y, torch.zeros(4).to(y), torch.ones(4).to(y)))


@sabotage()
def group_norm_in_a_slot(m: Any) -> None:
    m.post.bn1 = nn.GroupNorm(2, 6)


@sabotage()
def instance_norm_inside_a_branch(m: Any) -> None:
    hooked(m.post.bn1, lambda _, y: F.instance_norm(y))


@sabotage()
def layer_norm_of_channels(m: Any) -> None:
    hooked(m.end.bn, lambda _, y: F.layer_norm(y, y.shape[1:]))


@sabotage()
def own_norm_in_a_slot(m: Any) -> None:
    m.post.bn2 = Own()


@sabotage()
def running_mean_kept_in_a_list(m: Any) -> None:
    seen = [0.0]

    def change(own: nn.Module, y: Tensor) -> Tensor:
        seen[0] = 0.9 * seen[0] + 0.1 * float(y.detach().mean()) if own.training else seen[0]
        return y - seen[0]

    hooked(m.stem[0], change)


@sabotage()
def weight_standardised(m: Any) -> None:
    base = type(m.post.conv1)

    def forward(self: Any, x: Tensor) -> Tensor:
        w = self.weight
        return F.conv2d(x, (w - w.mean((1, 2, 3), True)) / w.std((1, 2, 3), keepdim=True), self.bias, padding=1)

    m.post.conv1.__class__ = type(base.__name__, (base,), {"forward": forward})


# The skip path -------------------------------------------------------------------------------------------------------


@sabotage()
def branch_writes_into_the_skip_path(m: Any) -> None:
    m.pre.bn1.register_forward_pre_hook(lambda _, args: (args[0].mul_(0.5) * 2,))


@sabotage()
def branch_writes_into_the_skip_path_in_train_mode(m: Any) -> None:
    m.pre.bn1.register_forward_pre_hook(lambda own, args: args[0].add_(0.1) if own.training else None)


@sabotage()
def branch_zeroes_a_negative_skip_path(m: Any) -> None:
    m.gated.conv.register_forward_pre_hook(lambda _, args: (args[0].relu_(),))


@sabotage()
def activation_back_in_place(m: Any) -> None:
    m.pre.act1.inplace = True
    if isinstance(m.pre.bn1, nn.Identity):
        return
    m.pre.bn1.__class__ = nn.Identity


@sabotage()
def skip_path_detached(m: Any) -> None:
    hooked(m.post.down, lambda _, y: y.detach())


@sabotage()
def skip_path_cut_off(m: Any) -> None:
    hooked(m.post.down, lambda _, y: y * 0)


@sabotage()
def projection_left_out(m: Any) -> None:
    m.post.down = nn.Identity()


@sabotage()
def branch_added_twice(m: Any) -> None:
    over(m.pre, lambda _, x, y: y + (y - x))


@sabotage()
def activation_moved_before_the_sum(m: Any) -> None:
    over(m.end.end, lambda _, x, y: torch.relu(y - 0.05))


# Alpha ---------------------------------------------------------------------------------------------------------------


def first(block: Any) -> Any:
    """Return what holds the bias of a block's first norm: its slot, or the layer in front of it."""
    return block.bn1 if isinstance(block.bn1, ChannelAffine) else block.conv1


def end(block: Any) -> Any:
    """Return what holds bias and alpha of a block that ends in a norm: its slot, or the layer in front of it."""
    return block.bn2 if isinstance(block.bn2, ChannelAffine) else block.conv2


def stem(model: Any) -> Any:
    """Return what holds the bias of the model's first norm."""
    return model.stem[1] if isinstance(model.stem[1], ChannelAffine) else model.stem[0]


def without_alpha(module: Any) -> Callable[[], Tensor]:
    """Take alpha off a layer that carries one on its weight; return what reads it."""
    raw, unit = module.raw_alpha, module.alpha_unit
    module.raw_alpha = None
    module.register_parameter("kept", raw)
    return lambda: (module.kept / unit).reshape(())


def alpha_as(module: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Let a layer compute with something that is made of its alpha."""
    base = type(module)

    def forward(self: Any, x: Tensor) -> Tensor:
        raw = self._parameters["raw_alpha"]
        try:
            self._parameters["raw_alpha"] = change(raw)
            return base.forward(self, x)  # type: ignore[no-any-return]
        finally:
            self._parameters["raw_alpha"] = raw

    module.__class__ = type(base.__name__, (base,), {"forward": forward, "__module__": base.__module__})


@sabotage()
def alpha_on_the_skip_path(m: Any) -> None:
    alpha = without_alpha(end(m.post))
    hooked(m.post.down, lambda _, y: y * alpha())


@sabotage()
def alpha_on_both_sides(m: Any) -> None:
    base = type(m.post)

    def forward(self: Any, x: Tensor) -> Tensor:
        alpha = (end(self).raw_alpha / end(self).alpha_unit).reshape(())
        y = self.bn2(self.conv2(self.drop(self.act(self.bn1(self.conv1(x))))))
        return self.act(y + alpha * self.down(x))  # type: ignore[no-any-return]

    m.post.__class__ = type(base.__name__, (base,), {"forward": forward})


@sabotage()
def alpha_behind_the_sum(m: Any) -> None:
    alpha = without_alpha(m.pre.conv2)
    hooked(m.pre, lambda _, y: y * alpha())


@sabotage()
def alpha_on_a_layer_inside_the_branch(m: Any) -> None:
    alpha = without_alpha(end(m.post))
    hooked(m.post.conv1, lambda _, y: y * alpha())


@sabotage()
def alpha_gone(m: Any) -> None:
    m.pre.conv2.raw_alpha = None


@sabotage()
def alpha_shared_by_two_branches(m: Any) -> None:
    end(m.post).raw_alpha = m.pre.conv2.raw_alpha


@sabotage()
def alpha_detached(m: Any) -> None:
    alpha_as(m.end.end.scale_activation, Tensor.detach)


@sabotage()
def alpha_detached_on_a_weight(m: Any) -> None:
    alpha_as(end(m.post), Tensor.detach)


@sabotage()
def alpha_learns_twice_as_fast_by_a_hook(m: Any) -> None:
    end(m.post).raw_alpha.register_hook(lambda grad: 2 * grad)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


@sabotage()
def alpha_learns_twice_as_fast_by_a_function(m: Any) -> None:
    alpha_as(m.pre.conv2, Doubled.apply)


@sabotage()
def branch_learns_twice_as_fast(m: Any) -> None:
    hooked(m.post.conv1, lambda _, y: Doubled.apply(y))


@sabotage()
def branch_learns_the_other_way(m: Any) -> None:
    hooked(m.post.conv1, lambda _, y: 2 * y.detach() - y)


@sabotage()
def alpha_of_the_wrong_sign(m: Any) -> None:
    hooked(m.post.conv2, lambda _, y: -y)


@sabotage()
def alpha_squared(m: Any) -> None:
    hooked(end(m.post), lambda own, y: y * (own.raw_alpha / own.alpha_unit).reshape(()))  # type: ignore[operator]


@sabotage()
def alpha_without_its_sign(m: Any) -> None:
    alpha_as(m.pre.conv2, torch.abs)


@sabotage()
def alpha_of_another_unit(m: Any) -> None:
    end(m.post).alpha_unit *= 2
    end(m.post).raw_alpha.data.mul_(2)


@sabotage()
def alpha_of_another_value(m: Any) -> None:
    end(m.post).alpha = 0.5


@sabotage()
def alpha_of_another_value_in_a_block_with_a_forward_of_its_own(m: Any) -> None:
    next(c for n, c in m.gated.named_children() if n.startswith("skipinit")).alpha = 0.9


@sabotage()
def alpha_of_half_of_the_channels(m: Any) -> None:
    setattr(end(m.post), "channels" if hasattr(end(m.post), "channels") else "alpha_channels", (0, 2))


@sabotage()
def alpha_frozen(m: Any) -> None:
    m.end.end.scale_activation.raw_alpha.requires_grad_(False)


@sabotage()
def every_alpha_frozen(m: Any) -> None:
    for name, p in m.named_parameters():
        p.requires_grad_(p.requires_grad and not name.endswith("raw_alpha"))


@sabotage()
def alpha_a_buffer(m: Any) -> None:
    raw = m.end.end.scale_activation.raw_alpha.detach()
    del m.end.end.scale_activation._parameters["raw_alpha"]
    m.end.end.scale_activation.register_buffer("raw_alpha", raw)


@sabotage()
def alpha_of_another_shape(m: Any) -> None:
    end(m.post).raw_alpha = nn.Parameter(end(m.post).raw_alpha.detach().reshape(()))


# Weights, biases, constants ------------------------------------------------------------------------------------------


@sabotage()
def bias_moved(m: Any) -> None:
    first(m.post).bias.data.add_(0.1)


@sabotage()
def bias_behind_an_alpha_moved(m: Any) -> None:
    end(m.post).bias.data.sub_(0.1)


@sabotage()
def bias_missing(m: Any) -> None:
    first(m.post).bias = None


@sabotage()
def bias_that_no_plan_gave(m: Any) -> None:
    m.pre.conv2.bias = nn.Parameter(torch.zeros(4))


@sabotage()
def bias_frozen(m: Any) -> None:
    stem(m).bias.requires_grad_(False)


@sabotage()
def weight_frozen(m: Any) -> None:
    m.post.conv1.weight.requires_grad_(False)


@sabotage()
def frozen_bias_thawed(m: Any) -> None:
    m.aux.bias.requires_grad_(True)


@sabotage()
def weight_doubled(m: Any) -> None:
    m.post.conv1.weight.data.mul_(2)


@sabotage()
def weight_of_a_filter_zeroed(m: Any) -> None:
    m.post.conv1.weight.data[0] = 0


@sabotage()
def weight_of_the_head_moved(m: Any) -> None:
    m.fc.weight.data.mul_(1.5)


@sabotage()
def bias_of_the_head_moved(m: Any) -> None:
    m.fc.bias.data.add_(0.25)


@sabotage()
def weight_in_float64(m: Any) -> None:
    m.fc.bias.data = m.fc.bias.data.double()


@sabotage()
def biases_shared(m: Any) -> None:
    end(m.post).bias = stem(m).bias


@sabotage()
def weights_shared(m: Any) -> None:
    m.gated.conv.weight = m.end.conv.weight


@sabotage()
def heads_untied(m: Any) -> None:
    m.aux.weight = nn.Parameter(m.aux.weight.detach().clone())


@sabotage()
def weight_a_buffer(m: Any) -> None:
    weight = m.stem[0].weight.detach()
    del m.stem[0]._parameters["weight"]
    m.stem[0].register_buffer("weight", weight)


@sabotage(*PRESERVE)
def weight_of_another_unit(m: Any) -> None:
    m.post.conv1.weight.data.mul_(2)
    m.post.bn1.gain /= 2


@sabotage(*PRESERVE)
def bias_of_another_unit(m: Any) -> None:
    m.post.bn1.bias.data.mul_(4)
    m.post.bn1.bias_unit *= 4


@sabotage(*PRESERVE)
def gain_of_one_channel_moved_into_the_weight(m: Any) -> None:
    m.post.conv1.weight.data[1].mul_(m.post.bn1.gain[1])
    m.post.bn1.gain[1] = 1


@sabotage(*PRESERVE)
def gain_wrong(m: Any) -> None:
    m.post.bn2.gain *= 1.01


@sabotage(*PRESERVE)
def gain_learns(m: Any) -> None:
    gain = m.post.bn1.__dict__.pop("gain")
    m.post.bn1._parameters["gain"] = nn.Parameter(gain)


@sabotage(*PRESERVE)
def mean_wrong(m: Any) -> None:
    m.post.conv1.center = m.post.conv1.center + 0.3


@sabotage(*PRESERVE)
def mean_wrong_and_made_good(m: Any) -> None:
    conv = m.post.conv1
    before = conv.combined()[1].detach()
    conv.center = conv.center + 0.3
    conv.at_center = conv.at_center + before - conv.combined()[1].detach()


@sabotage(*PRESERVE)
def mean_left_out_and_made_good(m: Any) -> None:
    conv = m.post.conv1
    before = conv.combined()[1].detach()
    conv.center = conv.at_center = None
    conv.fixed_bias = before


@sabotage(*SKIPINIT)
def weights_drawn_too_large(m: Any) -> None:
    nn.init.normal_(m.post.conv1.weight, std=3 * m.post.conv1.weight.std().item())


@sabotage(*SKIPINIT)
def weights_drawn_around_another_mean(m: Any) -> None:
    m.end.conv.weight.data.add_(1)


@sabotage(*SKIPINIT)
def every_alpha_starts_at_one(m: Any) -> None:
    for name, p in m.named_parameters():
        if name.endswith("raw_alpha"):
            p.data.fill_(1)


# State ---------------------------------------------------------------------------------------------------------------


@sabotage()
def extra_buffer(m: Any) -> None:
    m.post.register_buffer("more", torch.zeros(2))


@sabotage()
def extra_buffer_that_is_not_saved(m: Any) -> None:
    m.post.register_buffer("more", torch.zeros(2), persistent=False)


@sabotage()
def extra_parameter(m: Any) -> None:
    m.pre.more = nn.Parameter(torch.zeros(2))


@sabotage()
def extra_module(m: Any) -> None:
    m.pre.more = nn.Linear(2, 2)


@sabotage()
def statistics_in_a_slot(m: Any) -> None:
    m.post.bn1.register_buffer("running_mean", torch.zeros(6))


@sabotage()
def statistics_in_a_slot_that_are_not_saved(m: Any) -> None:
    m.post.bn1.register_buffer("running_var", torch.ones(6), persistent=False)


@sabotage()
def statistics_in_a_slot_as_an_attribute(m: Any) -> None:
    m.stem[1].running_mean = torch.zeros(4)


@sabotage()
def buffer_changed(m: Any) -> None:
    m.scale.fill_(1.0)


@sabotage()
def buffer_no_longer_saved(m: Any) -> None:
    m._non_persistent_buffers_set.add("scale")


@sabotage()
def key_renamed(m: Any) -> None:
    def rename(_: Any, state: Any, prefix: str, __: Any) -> None:
        state[f"{prefix}fc.shift"] = state.pop(f"{prefix}fc.bias")

    m._register_state_dict_hook(rename)


# What was the user's -------------------------------------------------------------------------------------------------


@sabotage()
def dropout_of_another_p(m: Any) -> None:
    m.post.drop.p = 0.5


@sabotage()
def dropout_by_hand_of_another_p(m: Any) -> None:
    m.end.p = 0.5


@sabotage()
def dropout_gone(m: Any) -> None:
    m.post.drop = nn.Identity()


@sabotage()
def dropout_of_channels(m: Any) -> None:
    m.post.drop = nn.Dropout2d(0.2)


@sabotage()
def dropout_in_both_modes(m: Any) -> None:
    patched(m.post.drop, lambda self, x: F.dropout(x, self.p, True))


@sabotage()
def dropout_added(m: Any) -> None:
    m.stem[2] = nn.Sequential(nn.ReLU(), nn.Dropout(0.1))


@sabotage()
def dropout_by_a_hook(m: Any) -> None:
    hooked(m.pre.conv1, lambda own, y: F.dropout(y, 0.3, own.training))


@sabotage()
def noise_in_train_mode(m: Any) -> None:
    hooked(m.stem[0], lambda own, y: y + 0.1 * torch.randn_like(y) if own.training else y)


@sabotage()
def class_of_a_block(m: Any) -> None:
    m.pre.__class__ = type("Pre", (Pre,), {})


@sabotage()
def class_of_a_block_is_no_longer_its_own(m: Any) -> None:
    forward = type(m.pre).forward
    m.pre.__class__ = type("Pre", (nn.Module,), {"forward": forward})


@sabotage()
def class_of_the_model(m: Any) -> None:
    m.__class__ = type("Net", (Net,), {})


@sabotage()
def activation_of_another_kind(m: Any) -> None:
    m.stem[2] = nn.GELU()


@sabotage()
def activation_gone(m: Any) -> None:
    m.pre.act2 = nn.Identity()


@sabotage()
def padding_of_another_kind(m: Any) -> None:
    m.post.conv1.padding_mode = "reflect"
    m.post.conv1._reversed_padding_repeated_twice = [1, 1, 1, 1]


@sabotage()
def hook_removed(m: Any) -> None:
    m.stem._forward_hooks.clear()


@sabotage()
def hook_bypassed(m: Any) -> None:
    base = type(m)

    def forward(self: Any, x: Tensor) -> Any:
        y = self.end(self.gated(self.pre(self.post(self.stem.forward(x))))) * self.scale
        y = y.mean((2, 3))
        return self.fc(y), self.aux(y)

    m.__class__ = type(base.__name__, (base,), {"forward": forward})


@sabotage()
def hook_of_another_kind(m: Any) -> None:
    m.stem._forward_hooks.clear()
    hooked(m.stem, lambda _, y: y * 1.2)


@sabotage()
def train_mode_computes_something_else(m: Any) -> None:
    hooked(m.end.end, lambda own, y: y * 1.01 if own.training else y)


@sabotage()
def eval_mode_computes_something_else(m: Any) -> None:
    hooked(m.post, lambda own, y: y if own.training else y * 1.01)


@sabotage()
def block_that_stays_in_eval_mode(m: Any) -> None:
    base = type(m.post)
    m.post.__class__ = type(base.__name__, (base,), {"train": lambda self, mode=True: base.train(self, False)})


@sabotage()
def head_computes_with_half_of_its_input(m: Any) -> None:
    over(m.fc, lambda self, x, y: y * 0.5)


@sabotage()
def calls_remembered(m: Any) -> None:
    calls: list[int] = []

    def change(_: nn.Module, y: Tensor) -> Tensor:
        calls.append(1)
        return y * (1 + len(calls) * 1e-3)

    hooked(m.stem[0], change)


# Cut off -------------------------------------------------------------------------------------------------------------


@sabotage()
def branch_cut_off(m: Any) -> None:
    hooked(m.post.conv2, lambda _, y: y * 0)


@sabotage()
def branch_cut_off_inside(m: Any) -> None:
    hooked(m.post.conv1, lambda _, y: y * 0)


@sabotage()
def branch_without_a_gradient(m: Any) -> None:
    hooked(m.post.conv1, lambda _, y: y.detach())


@sabotage()
def stem_without_a_gradient(m: Any) -> None:
    hooked(m.stem, lambda _, y: y.detach())


@sabotage()
def block_without_gradients_in_eval_mode(m: Any) -> None:
    hooked(m.post, lambda own, y: y if own.training else y.detach())


@sabotage()
def layer_left_out(m: Any) -> None:
    patched(m.gated.conv, lambda self, x: x)


@sabotage()
def block_left_out(m: Any) -> None:
    patched(m.pre, lambda self, x: x)


@sabotage()
def nothing_left_of_the_input(m: Any) -> None:
    hooked(m.stem, lambda _, y: torch.ones_like(y))


@sabotage()
def backward_pass_that_fails(m: Any) -> None:
    hooked(m.stem, lambda _, y: y.exp().add_(0).log())


@sabotage()
def forward_that_raises_in_train_mode(m: Any) -> None:
    def change(own: nn.Module, y: Tensor) -> Tensor:
        if own.training:
            raise ValueError("not in train mode")
        return y

    hooked(m.post, change)


def converted(init: str) -> tuple[Net, Net]:
    """Return the network, and what a right conversion makes of it."""
    original = make()
    torch.manual_seed(3)
    return original, normfree.convert(original, init=init)
