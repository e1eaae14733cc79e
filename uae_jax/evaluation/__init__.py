"""Evaluation on held-out images: reconstructions, captions, and the two protocols of Unified-Bench."""
