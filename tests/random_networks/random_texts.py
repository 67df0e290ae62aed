"""The texts that random networks with several paths are written with.

In them ``h`` is what flows, ``{i}`` the number of a link, ``{j}`` that of an earlier one or its own, ``{m}`` the mode
in which it does something else, ``{conv}`` how its convolution is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

HEADER = """
import collections, functools, types
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

SEEN = []


class Moded(nn.Module):
    def __init__(self):
        super().__init__()
        self.mode = 0
        self.gate = None
        self.drop = nn.Identity().eval()

    def open_gate(self):
        self.gate = nn.Tanh()

    def features(self, x):
        return x


class ConvNorm(Moded):
    def __init__(self, conv):
        super().__init__()
        self.conv, self.norm = conv, nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x))


class Stage(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.inner = nn.Sequential(conv)

    def forward(self, x):
        return self.inner(x)


class Helper:
    def __call__(self, layer, x):
        return layer(x)

    @staticmethod
    def lone(net, i, x):
        return getattr(net, f"c{i}")(x)


HELPER = Helper()
TABLE = {"apart": lambda net, x: net.c0(x)}


def convolve(layer, x):
    return layer(x)


def convolve_parts(net, x):
    for part in net.children():
        x = part(x) if isinstance(part, nn.Conv2d) else x
    return x


def convolve_all(modules, x):
    for module in modules:
        x = module(x) if isinstance(module, nn.Conv2d) else x
    return x


def convolve_named(net, name, x):
    return getattr(net, name)(x)


def convolve_deep(net, x):
    if isinstance(net, nn.Conv2d):
        return net(x)
    for part in net.children():
        x = convolve_deep(part, x)
    return x


def table(net):
    return dict(net.named_children())


class Keeper:
    def __init__(self, net):
        self.net = net

    def run(self, x):
        return convolve_parts(self.net, x)


class Wrapping(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        for part in self.net.children():
            x = part(x) if isinstance(part, nn.Conv2d) else x
        return x


def both(conv, norm, x):
    return norm(conv(x))
"""


@dataclass(frozen=True)
class Text:
    """How a link is written: what builds it, what calls it, what else its class has."""

    body: str
    init: str = "self.c{i}, self.b{i} = {conv}, nn.BatchNorm2d(4)"
    methods: str = ""
    features: str = "h = self.b{i}(self.c{i}(h))"


OWN = "self.c{i}, self.b{i} = {conv}, nn.BatchNorm2d(4)\n"
LIST = "self.s{i} = nn.Sequential({conv}, nn.BatchNorm2d(4))"
PAIR = "h = self.b{i}(self.c{i}(h))"
LINKS: dict[str, Text] = {
    # One path
    "plain": Text(PAIR),
    "in two lines": Text("y = self.c{i}(h)\nh = self.b{i}(y)"),
    "sequence": Text("h = self.s{i}(h)", LIST, features="h = self.s{i}(h)"),
    "module": Text("h = self.n{i}(h)", "self.n{i} = ConvNorm({conv})", features="h = self.n{i}(h)"),
    "in a stage": Text(
        "h = self.b{i}(self.g{i}(h))",
        "self.g{i}, self.b{i} = Stage({conv}), nn.BatchNorm2d(4)",
        features="h = self.b{i}(self.g{i}(h))",
    ),
    "method": Text("h = self.b{i}(self.part{i}(h))", methods="def part{i}(self, x):\n    return self.c{i}(x)\n"),
    "norm in front": Text("h = self.c{i}(F.relu(self.b{i}(h)))", features="h = self.c{i}(F.relu(self.b{i}(h)))"),
    "helper for both": Text("h = both(self.c{i}, self.b{i}, h)"),
    "bare norm": Text("h = self.b{i}(h)", features="h = self.b{i}(h)"),
    # What was called before
    "layer of another": Text(
        "h = self.b{i}((self.c{j} if hasattr(self, 'c{j}') else self.c{i})(h))",
    ),
    "shared": Text(PAIR, OWN + "self.c{i} = getattr(self, 'c{j}', self.c{i})"),
    "shared norm": Text(PAIR, OWN + "self.b{i} = getattr(self, 'b{j}', self.b{i})"),
    "shared weight": Text(
        PAIR,
        OWN + "if hasattr(self, 'c{j}') and self.c{j}.kernel_size == ({k}, {k}):\n"
        "    self.c{i}.weight = self.c{j}.weight",
    ),
    "twice": Text(PAIR + "\nif self.mode == {m}:\n    h = self.b{i}(h)"),
    # What is handed on
    **{
        name: Text(
            "h = self.n{i}(h)",
            "self.n{i} = ConvNorm({conv})",
            features=f"h = {how}",
        )
        for name, how in {
            "parts of a part": "convolve_parts(self.n{i}, h)",
            "parts by keyword": "convolve_parts(x=h, net=self.n{i})",
            "parts in a list": "convolve_all([*self.n{i}.children()], h)",
            "modules of a part": "convolve_all(self.n{i}.modules(), h)",
            "part by its name": "convolve_named(self.n{i}, 'conv', h)",
            "part in a table": "table(self.n{i})['conv'](h)",
            "deep": "convolve_deep(self.n{i}, h)",
            "partial of a part": "functools.partial(convolve_parts, self.n{i})(h)",
            "object for a part": "Keeper(self.n{i}).run(h)",
            "module around a part": "Wrapping(self.n{i})(h)",
            "function in a table": "{{'go': convolve_parts}}['go'](self.n{i}, h)",
            "first of a part": "next(self.n{i}.children())(h)",
            "reduced": "functools.reduce(lambda y, m: convolve_all([m], y), self.n{i}.children(), h)",
        }.items()
    },
    "parts of a mode": Text(
        "h = convolve_parts(self.n{i}, h) if self.mode == {m} else self.n{i}(h)",
        "self.n{i} = ConvNorm({conv})",
        features="h = self.n{i}(h)",
    ),
    "parts by a variable": Text(
        "part = self.n{i}\nif self.mode == {m}:\n    h = next(iter(part.children()))(h)\nelse:\n    h = part(h)",
        "self.n{i} = ConvNorm({conv})",
        features="h = self.n{i}(h)",
    ),
    "only counted": Text(
        PAIR, features="h = self.b{i}(self.c{i}(h)) * len([m for m in self.modules() if hasattr(m, 'kernel_size')])"
    ),
    # A mode that is switched later
    "apart": Text("h = self.c{i}(h) if self.mode == {m} else self.b{i}(self.c{i}(h))"),
    "left out": Text("y = self.c{i}(h)\nh = y if self.mode == {m} else self.b{i}(y)"),
    "decided between": Text("h = self.c{i}(h)\nif self.mode == {m}:\n    h = h * 2\nh = self.b{i}(h)"),
    "other input": Text("y = h if self.mode == {m} else self.c{i}(h)\nh = self.b{i}(y)"),
    "kept": Text("y = self.c{i}(h)\nh = self.b{i}(y)\nif self.mode == {m}:\n    h = h + y"),
    "kept on self": Text("self.last = self.c{i}(h)\nh = self.b{i}(self.last)\nif self.mode == {m}:\n    h = self.last"),
    "kept in a list": Text("ys = [self.c{i}(h)]\nh = self.b{i}(ys[0])\nif self.mode == {m}:\n    h = ys[0]"),
    "local variables": Text("y = self.c{i}(h)\nh = self.b{i}(y)\nif self.mode == {m}:\n    h = locals()['y']"),
    "function": Text(
        PAIR + "\nif self.mode == {m}:\n    h = F.conv2d(h, self.c{i}.weight, self.c{i}.bias, padding={p})"
    ),
    "parameters": Text(PAIR + "\nif self.mode == {m}:\n    h = F.conv2d(h, *self.c{i}.parameters(), padding={p})"),
    "getattr": Text("h = getattr(self, 'c{i}')(h)\nif self.mode != {m}:\n    h = getattr(self, 'b{i}')(h)"),
    "modules": Text("h = self._modules['c{i}'](h) if self.mode == {m} else self.b{i}(self.c{i}(h))"),
    "submodule": Text("h = self.get_submodule('c{i}')(h) if self.mode == {m} else self.b{i}(self.c{i}(h))"),
    "alias": Text("layer = self.c{i}\nh = layer(h) if self.mode == {m} else self.b{i}(layer(h))"),
    "either norm": Text(
        "norm = self.drop if self.mode == {m} else self.b{i}\nh = norm(self.c{i}(h))",
    ),
    "helper": Text("h = convolve(self.c{i}, h)\nif self.mode != {m}:\n    h = self.b{i}(h)"),
    "helper of a class": Text("h = Helper.lone(self, {i}, h) if self.mode == {m} else self.b{i}(self.c{i}(h))"),
    "helper that is called": Text("h = HELPER(self.c{i}, h) if self.mode == {m} else self.b{i}(self.c{i}(h))"),
    "table": Text(
        "if self.mode == {m} and hasattr(self, 'c0'):\n    h = TABLE['apart'](self, h)\n"
        "else:\n    h = self.b{i}(self.c{i}(h))"
    ),
    "early return": Text("h = self.c{i}(h)\nif self.mode == {m}:\n    return h\nh = self.b{i}(h)"),
    "caught": Text(
        "y = self.c{i}(h)\ntry:\n    if self.mode == {m}:\n        raise KeyError\n    h = self.b{i}(y)\n"
        "except KeyError:\n    h = y * 2"
    ),
    "loop": Text("for _ in range(2 if self.mode == {m} else 1):\n    h = self.c{i}(h)\nh = self.b{i}(h)"),
    "loop of both": Text("for _ in range(2 if self.mode == {m} else 1):\n    h = self.b{i}(self.c{i}(h))"),
    "first of a sequence": Text(
        "h = self.s{i}[0](h) if self.mode == {m} else self.s{i}(h)", LIST, features="h = self.s{i}(h)"
    ),
    "slice of a sequence": Text("h = self.s{i}[: 1 if self.mode == {m} else 2](h)", LIST, features="h = self.s{i}(h)"),
    "loop over a sequence": Text(
        "for layer in self.s{i}:\n    h = layer(h)\n    if self.mode == {m}:\n        break",
        LIST,
        features="h = self.s{i}(h)",
    ),
    "loop apart": Text(
        "if self.mode == {m}:\n    for layer in list(self.s{i})[:1]:\n        h = layer(h)\n"
        "else:\n    h = self.s{i}(h)",
        LIST,
        features="h = self.s{i}(h)",
    ),
    "checkpointed": Text(
        "if self.mode == {m}:\n    y = checkpoint(self.part{i}, h, use_reentrant=False)\n"
        "else:\n    y = self.part{i}(h)\nh = self.b{i}(y)",
        methods="def part{i}(self, x):\n    return self.c{i}(x)\n",
    ),
    "method with an option": Text(
        "h = self.part{i}(h, self.mode == {m})",
        methods="def part{i}(self, x, bare=False):\n    x = self.c{i}(x)\n    return x if bare else self.b{i}(x)\n",
    ),
    "closure": Text(
        "def inner(x):\n    return self.c{i}(x)\nh = inner(h) if self.mode == {m} else self.b{i}(inner(h))",
    ),
    "inside of a module": Text(
        "h = self.n{i}.conv(h) if self.mode == {m} else self.n{i}(h)",
        "self.n{i} = ConvNorm({conv})",
        features="h = self.n{i}(h)",
    ),
    "replaced": Text("if self.mode == {m}:\n    self.b{i} = nn.Identity()\n" + PAIR),
    # Options, gates, modes of other layers
    "option": Text("h = self.c{i}(h)\nif norm:\n    h = self.b{i}(h)"),
    "mask": Text("h = self.c{i}(h)\nif mask is not None:\n    h = h * mask\nh = self.b{i}(h)"),
    "gate": Text("h = self.c{i}(h)\nif self.gate is not None:\n    h = self.gate(h)\nh = self.b{i}(h)"),
    "mode of another": Text("h = self.c{i}(h)\nif self.drop.training:\n    h = h + 1\nh = self.b{i}(h)"),
    "gradients": Text("h = self.c{i}(h)\nif torch.is_grad_enabled():\n    h = h + 1\nh = self.b{i}(h)"),
    "written between": Text("h = self.c{i}(h)\nh.mul_(0.5)\nh = self.b{i}(h)"),
    "a view between": Text("y = self.c{i}(h)\nz = y[:, :2]\nh = self.b{i}(y)\nif self.mode == {m}:\n    h[:, :2] += z"),
    # Who else holds a layer
    **{
        f"held in {name}": Text(
            f"h = {call} if self.mode == {{m}} else self.b{{i}}(self.c{{i}}(h))", OWN + f"self.held{{i}} = {what}"
        )
        for name, what, call in (
            ("a list", "[self.c{i}]", "self.held{i}[0](h)"),
            ("a list with the norm", "[self.b{i}, self.c{i}]", "self.held{i}[0](h)"),
            ("a deque", "collections.deque([self.c{i}])", "self.held{i}[0](h)"),
            ("a namespace", "types.SimpleNamespace(layer=self.c{i})", "self.held{i}.layer(h)"),
            ("a partial", "functools.partial(convolve, self.c{i})", "self.held{i}(h)"),
            ("a closure", "(lambda layer: lambda x: layer(x))(self.b{i})", "self.held{i}(h)"),
            ("a method", "self.b{i}.forward", "self.held{i}(h)"),
            ("a list of another", "[getattr(self, 'c{j}', self.c{i})]", "self.held{i}[0](h)"),
        )
    },
    # Other methods
    **{
        f"features {name}": Text(PAIR, features=text)
        for name, text in (
            ("apart", "h = self.c{i}(h)"),
            ("by an alias", "layer = self.c{i}\nh = layer(h)"),
            ("by name", "h = self.get_submodule('c{i}')(h)"),
            ("by a loop", "h = [m for m in self.children() if isinstance(m, nn.Conv2d)][0](h)"),
            (
                "by a hook",
                "kept = []\nhandle = self.c{i}.register_forward_hook(lambda *a: kept.append(a[2]))\n"
                "self(h)\nhandle.remove()\nh = kept[0]",
            ),
            ("by a function", "h = F.conv2d(h, self.c{i}.weight, self.c{i}.bias, padding={p})"),
            ("by a helper", "h = convolve(self.c{i}, h)"),
        )
    },
    "features by a method": Text(
        PAIR, methods="def layer{i}(self):\n    return self.c{i}\n", features="h = self.layer{i}()(h)"
    ),
    "features by a property": Text(
        PAIR, methods="@property\ndef layer{i}(self):\n    return self.c{i}\n", features="h = self.layer{i}(h)"
    ),
    "features of a sequence": Text(
        "h = self.s{i}(h)", LIST, features="for layer in self.s{i}:\n    h = layer(h)\n    break"
    ),
    "features of an alias": Text("h = self.s{i}(h)", LIST, features="seq = self.s{i}\nh = seq[0](h)"),
}

ADDITIONS: dict[str, str] = {
    text: text
    for text in (
        "h = h + x",
        "h += x",
        "h.add_(x)",
        "h = x + h",
        "h = torch.add(h, x)",
        "h = h + x\nh.relu_()",
        "h += x\nh = F.relu(h, inplace=True)",
        "y = h\ny += x\nh = y",
        "h.data.add_(x)",
        "h = [h]\nh[0] += x\nh = h[0]",
        "h[:, :2] += x[:, :2]",
        "torch.add(h, x, out=h)",
        "h = h + x\nif self.mode == 1:\n    h = h * 2",
        "h = h if self.mode == 2 else h + x",
        "x = x.clone()\nx.add_(h)\nh = x",
        "h.view(-1).add_(x.reshape(-1))",
        "h = h * 0.5\nh += x",
        "pass",
    )
}

ACTS = (
    "h = F.relu(h)",
    "h = h.relu_()",
    "h = F.relu(h, inplace=True)",
    "h = torch.tanh(h)",
    "",
    "h = h * torch.sigmoid(h)",
    "h = h.clone()\nh += 1",
)

AROUND: dict[str, str] = {
    "plain": "x = self.blocks[{i}](x, norm, mask)",
    "by name": "x = self.blocks[{i}](x, norm=norm, mask=mask)",
    "checkpointed": "x = checkpoint(self.blocks[{i}], x, norm, mask, use_reentrant=False)",
    "twice": "x = self.blocks[{i}](x, norm, mask)\nif self.mode == 2:\n    x = self.blocks[{i}](x, norm, mask)",
    "left out": "x = x if self.mode == 1 else self.blocks[{i}](x, norm, mask)",
    "features": "x = self.blocks[{i}].features(x) if self.mode == 2 else self.blocks[{i}](x, norm, mask)",
}


def _noting(seen: list[Tensor], value: Any) -> None:
    seen += [t.detach().clone() for t in (value if isinstance(value, tuple) else (value,)) if isinstance(t, Tensor)]


HOOKS: dict[str, Any] = {
    "sees what comes out": lambda m, seen: m.register_forward_hook(lambda m, x, y: _noting(seen, y)),
    "sees what goes in": lambda m, seen: m.register_forward_pre_hook(lambda m, x: _noting(seen, x)),
    "halves what comes out": lambda m, seen: m.register_forward_hook(lambda m, x, y: y * 0.5),
    "shifts what goes in": lambda m, seen: m.register_forward_pre_hook(lambda m, x: (x[0] + 1, *x[1:])),
    "writes into what comes out": lambda m, seen: m.register_forward_hook(lambda m, x, y: y.mul_(0.5)),
}


def is_norm(module: nn.Module) -> bool:
    """Whether a conversion should have taken a module away."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
