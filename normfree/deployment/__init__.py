"""After training: the model with plain layers, with its norms back, or in a format other than PyTorch's."""
