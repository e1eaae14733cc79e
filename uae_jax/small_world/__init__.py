"""The small world: a procedural data set with exact ground truth, its processor, and its model sizes."""
