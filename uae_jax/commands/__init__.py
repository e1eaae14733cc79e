"""The commands of `uae-jax`, one file each, and what they share."""
