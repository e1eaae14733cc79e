"""State, optimizer, checkpoints, the loop, and the stages."""
