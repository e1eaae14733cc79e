"""Janus-Pro: one language model that reads images through a SigLIP tower and writes them as tokens of a VQ."""
