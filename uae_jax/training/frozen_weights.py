"""Weights of captioner and decoder as int8 on the devices while a stage trains adapters on top of them.

Adapters of a decoder that the stage does not train become part of its rounded weights, where they cost nothing. Those
of the captioner stay apart, because its reference has them off.

The stage returns its parameters with the original weights, which stay in the memory of the hosts meanwhile: every
process keeps the shards of its own devices. Rounding is deterministic, so a resumed stage has the same int8 weights.
"""

import dataclasses
import re

import jax
import numpy as np

from uae_jax import trees
from uae_jax.layers.lora import merged_kernel
from uae_jax.layers.quantized import KERNELS, Int8Weight, abstract_weight, quantized_weight
from uae_jax.options import Stage
from uae_jax.options.stages import FLOAT, INT8, AdapterStage


class HostCopy:
  """A sharded array in host memory; each process holds what its own devices held."""

  def __init__(self, array: jax.Array):
    self._shape, self._sharding = array.shape, array.sharding
    # Copies: an array on a CPU would otherwise share its buffer with NumPy.
    self._shards = {_key(shard.index): np.array(shard.data) for shard in array.addressable_shards}

  def to_devices(self) -> jax.Array:
    return jax.make_array_from_callback(self._shape, self._sharding, lambda index: self._shards[_key(index)])


def _key(index: tuple[slice, ...] | None) -> tuple:
  return tuple((part.start, part.stop) for part in index or ())


def mode(section: Stage) -> str:
  """How a stage holds frozen weights: its `frozen_weights`, if it has that option."""
  return section.frozen_weights if isinstance(section, AdapterStage) else FLOAT


def is_rounded(section: Stage, path: str) -> bool:
  """Whether a stage stores the parameter at this path as int8.

  Raises:
    ValueError: it does, but the stage trains this parameter.
  """
  frozen = mode(section)
  if frozen == FLOAT or not re.search(KERNELS, path):
    return False
  if re.search(section.trainable, path):
    raise ValueError(
      f"frozen_weights = {frozen!r}: trainable = {section.trainable!r} trains {path}, which would be rounded: "
      f"train adapters only, or set frozen_weights = {FLOAT!r}"
    )
  return True


def has_merged_adapters(section: Stage, params: dict) -> bool:
  """Whether a stage leaves all of the decoder as it is."""
  return not any(path.startswith("decoder/") and re.search(section.trainable, path) for path, _ in trees.items(params))


def rounded(section: Stage, params: dict, adapter_scale: float) -> tuple[dict, dict[str, HostCopy]]:
  """The parameters in the form in which a stage holds them, and the originals of rounded weights by path.

  Rounds one weight at a time and deletes its original on the devices.

  Args:
    section: section of the stage; only some have `frozen_weights`.
    params: nested dict of arrays; its rounded weights are deleted.
    adapter_scale: alpha / r of the adapters.

  Raises:
    ValueError: the stage trains a weight that it would round.
  """
  leaves, merges = dict(trees.items(params)), has_merged_adapters(section, params)
  chosen = [path for path in leaves if is_rounded(section, path)]
  originals: dict[str, HostCopy] = {}

  def leaf(path: str, kernel: jax.Array) -> jax.Array | Int8Weight:
    if path not in chosen:
      return kernel
    originals[path] = HostCopy(kernel)
    weight, layer = kernel, path.removesuffix("kernel")
    has_adapter = merges and path.startswith("decoder/") and f"{layer}lora_a" in leaves
    if has_adapter:
      weight = merged_kernel(kernel, leaves[f"{layer}lora_a"], leaves[f"{layer}lora_b"], adapter_scale)
    rounded = quantized_weight(weight, rounds_activations=mode(section) == INT8)
    jax.block_until_ready(rounded)
    kernel.delete()
    return dataclasses.replace(rounded, has_adapter=has_adapter)

  return trees.from_items([(path, leaf(path, value)) for path, value in trees.items(params)]), originals


def abstract(section: Stage, params: dict) -> dict:
  """As `rounded`, of `ShapeDtypeStruct`s with shardings."""
  leaves, merges = dict(trees.items(params)), has_merged_adapters(section, params)

  def form(path: str, leaf):
    if not is_rounded(section, path):
      return leaf
    has_adapter = merges and path.startswith("decoder/") and f"{path.removesuffix('kernel')}lora_a" in leaves
    return dataclasses.replace(abstract_weight(leaf, rounds_activations=mode(section) == INT8), has_adapter=has_adapter)

  return trees.from_items((path, form(path, leaf)) for path, leaf in leaves.items())


def restored(params: dict, originals: dict[str, HostCopy]) -> dict:
  """The parameters with their original weights in place of the rounded ones."""
  return trees.from_items(
    (path, originals[path].to_devices() if path in originals else leaf) for path, leaf in trees.items(params)
  )
