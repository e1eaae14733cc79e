"""Frozen weights as int8, with one float32 scale per output channel, and products with them.

    y = (x @ values) * scale                                 the activations stay as they are
    y = (round(x / s) @ values) * s * scale, s per row       int8 x int8 -> int32, twice the rate on v5e and v6e

In training the gradient is straight-through: that of x @ (values * scale). The weight in float exists for one layer at
a time, and all-gathers move int8.

qwix rounds weights and activations. Its own products differentiate float weights that they round at every call, which
would keep and all-gather the float weights; here the weight is stored rounded and has no gradient.
"""

from collections.abc import Callable
import functools
import re

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from uae_jax import sharding, trees

# Kernels of the captioner's and decoder's blocks, nearly all weights. Embeddings, norms, input and output layers, the
# VAE and adapters are not quantized.
KERNELS = r"^(captioner|decoder)/.*(layers|last)/.*kernel$"


@flax.struct.dataclass
class Int8Weight:
  """A frozen weight of a linear layer, stands for values * scale.

  Attributes:
    values: int8[in, out] or, stacked, int8[L, in, out].
    scale: float32[1, out] or float32[L, 1, out].
    rounds_activations: whether products round the rows of their input to int8 as well.
    has_adapter: whether the layer's adapter was merged before rounding, so that the layer no longer applies it.
  """

  values: jax.Array
  scale: jax.Array
  rounds_activations: bool = flax.struct.field(pytree_node=False, default=False)
  has_adapter: bool = flax.struct.field(pytree_node=False, default=False)

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values.shape

  @property
  def ndim(self) -> int:
    return self.values.ndim


def quantize(params: dict, kernels: str = KERNELS) -> dict:
  """Quantizes the matching kernels to `Int8Weight`, one at a time, and deletes the originals in `params`.

  Args:
    params: nested dict of arrays; kernels are float[in, out] or, stacked, float[L, in, out].
    kernels: regular expression, searched in the path of each leaf.

  Raises:
    ValueError: no kernel matches.
  """

  def leaf(path: str, value: jax.Array):
    if not re.search(kernels, path):
      return value
    quantized = quantized_weight(value)
    jax.block_until_ready(quantized)
    value.delete()
    return quantized

  items = list(trees.items(params))
  if not any(re.search(kernels, path) for path, _ in items):
    raise ValueError(f"int8: no weight matches {kernels!r}")
  return trees.from_items((path, leaf(path, value)) for path, value in items)


def quantized_weight(kernel: jax.Array, *, rounds_activations: bool = False) -> Int8Weight:
  """Rounds a kernel float[..., in, out]; the result is sharded like it."""
  places = None
  if isinstance(kernel.sharding, NamedSharding):
    abstract = abstract_weight(kernel, rounds_activations=rounds_activations)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
  return _rounding(rounds_activations, places)(kernel)


@functools.cache
def _rounding(rounds_activations: bool, places: Int8Weight | None) -> Callable[[jax.Array], Int8Weight]:
  return jax.jit(lambda kernel: _round_weight(kernel, rounds_activations), out_shardings=places)


def abstract_weight(kernel: jax.Array | jax.ShapeDtypeStruct, *, rounds_activations: bool = False) -> Int8Weight:
  """The `ShapeDtypeStruct`s, with shardings, of a rounded kernel that has a `NamedSharding`."""
  weight = jax.eval_shape(lambda x: _round_weight(x, rounds_activations), kernel)
  place = kernel.sharding
  assert isinstance(place, NamedSharding)

  def placed(leaf):
    rules = (*place.spec, *(None,) * (leaf.ndim - len(place.spec)))
    spec = jax.P(*sharding.axes_of(leaf, rules))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place.update(spec=spec))

  return jax.tree.map(placed, weight)


def _round_weight(kernel: jax.Array, rounds_activations: bool) -> Int8Weight:
  outputs = tuple(axis for axis in range(kernel.ndim) if axis != kernel.ndim - 2)
  return Int8Weight(*_rounded(kernel, outputs), rounds_activations)


def _rounded(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
  """(int8, float32 scale) of x with one scale per index of `axes`; rounds in float32."""
  import qwix  # Imported late: nothing else needs it.

  quantized = qwix.quantize(x.astype(jnp.float32), jnp.int8, channelwise_axes=axes)
  return quantized.qvalue, quantized.scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, weight: Int8Weight, axes: tuple[str | None, str | None]) -> jax.Array:
  """x @ weight, in the dtype of x; the weight is all-gathered over `fsdp` as int8.

  Args:
    x: float[rows, in].
    weight: int8[in, out].
    axes: logical axis names of the weight.
  """
  weight = gathered(weight, axes)
  if weight.rounds_activations:
    rows, row_scale = _rounded(x, (0,))
    total = jnp.matmul(rows, weight.values, preferred_element_type=jnp.int32) * row_scale
  else:
    total = jnp.matmul(x, weight.values.astype(x.dtype), preferred_element_type=jnp.float32)
  return (total * weight.scale).astype(x.dtype)


def _forward(x, weight, axes):
  return product(x, weight, axes), weight


def _backward(axes, weight, gradient):
  weight = gathered(weight, axes)
  scaled = (gradient.astype(jnp.float32) * weight.scale).astype(gradient.dtype)
  return scaled @ weight.values.astype(gradient.dtype).T, None


product.defvjp(_forward, _backward)


def gathered(weight: Int8Weight, axes: tuple[str | None, ...]) -> Int8Weight:
  """The weight all-gathered over `fsdp`."""
  return jax.tree.map(lambda leaf: sharding.gather(leaf, *sharding.axes_of(leaf, axes)), weight)
