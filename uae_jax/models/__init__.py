"""Architectures: one file or folder a model, its frozen config and published sizes; no loading, no jit, no loss."""
