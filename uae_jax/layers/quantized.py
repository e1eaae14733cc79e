"""Frozen weights in eight bits, by qwix: int8 values, and one float32 scale for each output of each layer.

The layers compute as before, on weights that are made from the eight bits where they are used: what shrinks is memory,
and what a chip reads a step.
"""

import re

import jax
import jax.numpy as jnp
import qwix

from uae_jax import trees

# Matrices of the blocks of captioner and decoder: nearly all weights. Embeddings, norms, what goes in and out, the
# vae and adapters stay.
KERNELS = r"^(captioner|decoder)/.*(layers|last)/.*kernel$"


def quantize(params: dict, kernels: str = KERNELS) -> dict:
  """A tree whose chosen kernels are `qwix.QArray`; it consumes those of `params`, one after the other.

  Args:
    params: nested dict of arrays; kernels are float[in, out] or, stacked, float[L, in, out].
    kernels: regular expression over paths.

  Raises:
    ValueError: no kernel matches.
  """

  def leaf(path: str, value: jax.Array):
    if not re.search(kernels, path):
      return value
    quantized = _quantize(value)
    jax.block_until_ready(quantized)
    value.delete()
    return quantized

  items = list(trees.items(params))
  if not any(re.search(kernels, path) for path, _ in items):
    raise ValueError(f"int8: no weight matches {kernels!r}")
  return trees.from_items((path, leaf(path, value)) for path, value in items)


@jax.jit
def _quantize(kernel: jax.Array) -> qwix.QArray:
  outputs = [axis for axis in range(kernel.ndim) if axis != kernel.ndim - 2]
  return qwix.quantize(kernel.astype(jnp.float32), jnp.int8, channelwise_axes=outputs)


def dequantized(weight: jax.Array | qwix.QArray, dtype) -> jax.Array:
  """The weight in `dtype`, whatever form it rests in; scales are applied in float32, so it is rounded once."""
  return (qwix.dequantize(weight) if isinstance(weight, qwix.QArray) else weight).astype(dtype)
