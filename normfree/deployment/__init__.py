"""After training: a converted model comes in; out goes one with plain layers, one with its norms back, or a program."""
