"""The public Python API: `UAE`, a class around trained weights."""

from uae_jax.api.uae import UAE

__all__ = ["UAE"]
