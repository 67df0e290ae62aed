"""Look: a model comes in, graphs of what its forward does in both modes go out, with the tables that read them."""
