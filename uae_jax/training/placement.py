"""Shardings of the state of a stage."""

import jax
from jax.sharding import Mesh, NamedSharding

from uae_jax.sharding import replicated


def state_shardings(state, params: dict, mesh: Mesh):
  """Returns the shardings of a state: master weights, averages and both moments are sharded like their parameter.

  Without explicit shardings, `jax.jit` replicates the moments, three times the trainable parameters on every device.

  Args:
    state: abstract or concrete `State`.
    params: all parameters that the state was made from, as arrays or `ShapeDtypeStruct`s with shardings.
    mesh: mesh over which all other leaves, counters and keys, are replicated.

  Returns:
    The tree of `state` with a `NamedSharding` for each leaf.
  """
  places = {
    _name(path): leaf.sharding
    for path, leaf in jax.tree.leaves_with_path(params)
    if isinstance(leaf.sharding, NamedSharding)
  }

  def place(path, leaf):
    del leaf
    return places.get(_name(path), replicated(mesh))

  return jax.tree.map_with_path(place, state)


def _name(path: tuple) -> str:
  """The innermost names of nested dicts, with the field of a quantized parameter after them; "" without any."""
  is_name = [isinstance(key, jax.tree_util.DictKey) for key in path]
  if not any(is_name):
    return ""
  first = max(i for i, found in enumerate(is_name) if found)
  while first and is_name[first - 1]:
    first -= 1
  return jax.tree_util.keystr(path[first:])


def abstract_state(init, params: dict, mesh: Mesh):
  """Evaluates `init(params, key)` to `ShapeDtypeStruct`s with shardings, without allocating memory."""
  state = jax.eval_shape(init, params, jax.random.key(0))
  places = state_shardings(state, params, mesh)
  return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, places)
