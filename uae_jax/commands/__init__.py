"""The commands of `uae-jax`, one file per command, and their shared helpers."""
