"""PyTorch baselines (transformers, diffusers, PEFT): the same work on the same weights, one suite per file.

`mmdit`, `autoencoder` and `lora` do the work of diffusers and PEFT where these are absent, and on accelerators.
"""
