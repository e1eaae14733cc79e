"""PyTorch baselines (transformers, diffusers, PEFT): the same work on the same weights, one suite per file."""
