"""Architectures: one file or folder per model, with its config and published sizes; no loading, jit or losses."""
