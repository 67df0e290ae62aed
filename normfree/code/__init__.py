"""Read: a model's own code comes in, goes out: which layers it always calls together, and which it names elsewhere."""
