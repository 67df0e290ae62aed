"""Functions in the ways that forwards are written, to be read as bytecode: every Python writes them otherwise."""

from __future__ import annotations

TEXT = """
def straight(self, x):
    return self.b(self.c(x))

def in_two_lines(self, x):
    y = self.c(x)
    z = self.b(y)
    return z

def in_one_variable(self, x, y):
    x, y = self.c(x), y
    x = self.b(x)
    return x + y

def decided(self, x):
    y = self.c(x)
    if self.flag:
        y = y * 2
    return self.b(y)

def missing(self, x):
    x = self.c(x)
    if self.part is not None:
        x = self.part(x)
    return self.b(x)

def asked_of_the_norm(self, x):
    x = self.c(x)
    if self.b is not None:
        x = self.b(x)
    return x

def is_none(self, x):
    x = self.c(x)
    if self.b is None:
        return x
    return self.b(x)

def either(self, x):
    if self.flag:
        x = x.clone()
        y = self.other(x)
    else:
        y = self.part(x)
    return self.b(y)

def by_number(self, x):
    return self.seq[1](self.seq[0](x))

def by_slice(self, x):
    return self.seq[:2](x)

def by_keyword(self, x):
    return self.b(input=self.c(input=x))

def by_star(self, *xs):
    return self.b(*[self.c(*xs)])

def by_two_stars(self, *xs, **ys):
    return self.b(self.c(*xs, **ys))

def by_name(self, x):
    return getattr(self.layers, "1")(getattr(self.layers, "0")(x))

def through_a_helper(self, x):
    return both(self.c, self.b, x)

def in_a_loop(self, x):
    for layer in self.seq:
        x = layer(x)
    return x

def in_a_comprehension(self, xs):
    return [self.b(self.c(x)) for x in xs]

def constant(self):
    return 1

def kept(self, x):
    self.last = self.c(x)
    return self.b(self.last)

def walrus(self, x):
    return self.b(y := self.c(x)) + y

def deleted(self, x):
    y = self.c(x)
    z = self.b(y)
    del y
    return z

def closed_over(self, x):
    def inner():
        return self.b(x)
    x = self.c(x)
    return inner()

def caught(self, x):
    y = self.c(x)
    try:
        return self.b(y)
    except KeyError:
        return y

def with_something(self, x):
    with guard():
        x = self.c(x)
    return self.b(x)

def super_called(self, x):
    return self.b(super().forward(x))

def joined(self, x):
    return self.b(f"{x}" if self.c and x else x)

def counted(self, x):
    for i in range(3):
        x = self.b(self.c(x)) + i
    return x

def unpacked(self, x):
    y, z = self.c(x), self.b
    return z(y)

def matched(self, x):
    y = self.c(x)
    match self.mode:
        case 1:
            return y
    return self.b(y)

def asserted(self, x):
    y = self.c(x)
    assert y is not None
    return self.b(y)

def scaled(self, x):
    y = self.c(x)
    y *= 2
    return self.b(y)

def yielded(self, x):
    y = self.c(x)
    yield y
    yield self.b(y)
"""
