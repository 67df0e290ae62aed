"""Edit: a plan and a model come in, the model without norms goes out; nothing is decided here any more."""
