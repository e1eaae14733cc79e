"""NaN and infinite weights: one of them makes every caption and image noise, so that they are refused by name."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

WHAT = "has values that are NaN or infinite"


def finite_rows(leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """For each leaf x with N rows: whether x[i] is finite, bool[N]; bool[1] for a scalar, True for whole numbers.

  Args:
    leaves: name -> array. Those of a mesh are looked at where they are, in one program; every process of the mesh must
      call this.
  """
  rows, far = {}, {}
  for name, x in leaves.items():
    if not jnp.issubdtype(x.dtype, jnp.inexact):
      rows[name] = np.ones(x.shape[:1] or 1, bool)
    elif isinstance(x, jax.Array) and (x.sharding.num_devices > 1 or next(iter(x.devices())).platform != "cpu"):
      far[name] = x
    else:
      rows[name] = np.asarray(_rows(np.asarray(x), np))
  if far:
    sharding = next(iter(far.values())).sharding
    replicated = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    found = jax.jit(lambda leaves: jax.tree.map(_rows, leaves), out_shardings=replicated)(far)
    rows |= jax.tree.map(np.asarray, found)
  return rows


def _rows(x: Any, module: Any = jnp) -> Any:
  x = module.atleast_1d(x)
  return module.all(module.isfinite(x), axis=tuple(range(1, x.ndim)))
