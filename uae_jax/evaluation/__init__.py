"""Held-out figures: reconstructions, captions, benchmarks."""
