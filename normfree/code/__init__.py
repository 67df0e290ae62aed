"""Read: functions of a model come in; out goes which layers are always called together, which are used elsewhere."""
