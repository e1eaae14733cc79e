"""A stored constant: saved, loaded and sharded like a parameter, never trained."""

from flax import nnx


class Buffer(nnx.Variable):
  """A constant array: position tables, latent statistics, the pooled embedding of the empty prompt."""
