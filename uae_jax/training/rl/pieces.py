"""The prompts of a step in pieces, which are generated one after the other, so that their rewards can begin earlier.

Piece i of n takes rows i, i + n, ...: with rows sharded in blocks, each device keeps its own rows.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def piece_key(key: jax.Array, piece: jax.Array | None) -> jax.Array:
  """Returns the key of a piece, for what differs between pieces; the key itself for a step in one piece, None."""
  return key if piece is None else jax.random.fold_in(key, piece)


def cut(rows: Any, piece: jax.Array, num_pieces: int) -> Any:
  """Selects the rows of a piece; the first axis of every leaf is rows."""
  return jax.tree.map(lambda x: x.reshape(-1, num_pieces, *x.shape[1:])[:, piece], rows)


def join(pieces: Sequence[Any]) -> Any:
  """Joins the rows of all pieces; the inverse of `cut`."""
  return jax.tree.map(lambda *parts: jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:]), *pieces)


def join_metrics(pieces: Sequence[dict[str, jax.Array]]) -> dict[str, jax.Array]:
  """Joins metrics of pieces of equal size: extremes where a name says so, else means."""

  def of(name: str, values: jax.Array) -> jax.Array:
    if name.endswith("_min"):
      return jnp.min(values)
    return jnp.max(values) if name.endswith("_max") else jnp.mean(values)

  return {name: of(name, jnp.stack([piece[name] for piece in pieces])) for name in pieces[0]}
