"""Random numbers from one PRNG key per row, so that a row's numbers do not depend on how its batch is split."""

from collections.abc import Callable

import jax


def split(keys: jax.Array, num: int) -> tuple[jax.Array, ...]:
  """Splits keys [B] into `num` arrays of keys [B]."""
  parts = jax.vmap(lambda key: jax.random.split(key, num))(keys)
  return tuple(parts[:, i] for i in range(num))


def draw(function: Callable, keys: jax.Array, *shape: int) -> jax.Array:
  """Draws [B, *shape] by a function of `jax.random` such as `normal`, with one key of keys [B] per row."""
  return jax.vmap(lambda key: function(key, shape))(keys)
