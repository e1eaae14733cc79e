"""Frozen weights quantized with qwix: int8 values and one float32 scale per output channel of each layer.

Layers dequantize a weight where they use it and compute as before. This saves memory, and memory bandwidth per step.
"""

import re
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from uae_jax import trees

if TYPE_CHECKING:
  import qwix

# Kernels of the captioner's and decoder's blocks, nearly all weights. Embeddings, norms, input and output layers, the
# VAE and adapters are not quantized.
KERNELS = r"^(captioner|decoder)/.*(layers|last)/.*kernel$"


def quantize(params: dict, kernels: str = KERNELS) -> dict:
  """Quantizes the matching kernels to `qwix.QArray`, one at a time, and deletes the originals in `params`.

  Args:
    params: nested dict of arrays; kernels are float[in, out] or, stacked, float[L, in, out].
    kernels: regular expression, searched in the path of each leaf.

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
def _quantize(kernel: jax.Array) -> "qwix.QArray":
  import qwix  # Imported late: nothing else needs it.

  outputs = [axis for axis in range(kernel.ndim) if axis != kernel.ndim - 2]
  return qwix.quantize(kernel.astype(jnp.float32), jnp.int8, channelwise_axes=outputs)


def dequantized(weight: "jax.Array | qwix.QArray", dtype) -> jax.Array:
  """The weight in `dtype`, dequantized if necessary; scales are applied in float32, so it is rounded once."""
  if isinstance(weight, jax.Array | np.ndarray):
    return jnp.asarray(weight, dtype)
  import qwix

  return qwix.dequantize(weight).astype(dtype)
