"""Where every leaf of a stage's state lives."""

import jax
from jax.sharding import Mesh, NamedSharding

from uae_jax import trees
from uae_jax.sharding import replicated


def state_shardings(state, params: dict, mesh: Mesh):
  """Shardings of a state: copies of a parameter (its master, averages and both moments) lie as the parameter does.

  Left to itself, `jax.jit` replicates moments, three times the trainable parameters on every device.

  Args:
    state: abstract or real `State`.
    params: arrays or `ShapeDtypeStruct`s with shardings, all that the state was made from.
    mesh: for what is no copy of a parameter: counters and keys, on every device.

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
  """`init(params, key)` as `ShapeDtypeStruct`s with shardings; allocates nothing."""
  state = jax.eval_shape(init, params, jax.random.key(0))
  places = state_shardings(state, params, mesh)
  return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, places)
