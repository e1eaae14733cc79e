"""Base models: trains the held-out embedder, DINOv2."""

from uae_jax.training.stages import contrastive

SPEC = contrastive.spec("dinov2")
