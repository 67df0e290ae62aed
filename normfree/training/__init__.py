"""Train: a model comes in; out go first weights, constants, parameter groups, and the size of its signals."""
