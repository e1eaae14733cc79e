"""Training: state, optimizer, checkpoints, the training loop, and the stages."""
