"""Before and during training: initial weights, calibration, parameter groups and clipping, the size of signals."""
