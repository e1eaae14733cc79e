"""Base models: trains the reward embedder, CLIP."""

from uae_jax.training.stages import contrastive

SPEC = contrastive.spec("clip")
