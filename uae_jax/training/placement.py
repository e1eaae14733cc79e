"""Shardings of the state of a stage."""

import jax
from jax.sharding import Mesh, NamedSharding

from uae_jax import trees
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
  places = {path: leaf.sharding for path, leaf in trees.items(params) if isinstance(leaf.sharding, NamedSharding)}

  def place(path, leaf):
    del leaf
    names = []
    for key in reversed(path):
      if not isinstance(key, jax.tree_util.DictKey):
        break
      names.append(key.key)
    return places.get("/".join(reversed(names)), replicated(mesh))

  return jax.tree.map_with_path(place, state)


def abstract_state(init, params: dict, mesh: Mesh):
  """Evaluates `init(params, key)` to `ShapeDtypeStruct`s with shardings, without allocating memory."""
  state = jax.eval_shape(init, params, jax.random.key(0))
  places = state_shardings(state, params, mesh)
  return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, places)
