"""Nested dicts of arrays: paths, selection, casting, counting. All modules exchange parameters in this form."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Mapping  # nested: str -> Tree | array


def items(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Yields (path, leaf) pairs, such as `("layers/attention/query/kernel", leaf)`, in dict order.

  Leaves are JAX or NumPy arrays, or describe one, like `jax.ShapeDtypeStruct`.
  """
  for name, value in tree.items():
    path = f"{prefix}{name}"
    if isinstance(value, Mapping):
      yield from items(value, path + "/")
    else:
      yield path, value


def from_items(pairs) -> dict:
  """The nested dict of `("a/b/c", leaf)` pairs; the inverse of `items`."""
  tree: dict = {}
  for path, leaf in pairs:
    *parents, name = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree


def split(tree: Tree, predicate: Callable[[str], bool]) -> tuple[dict, dict]:
  """Splits a tree into (leaves whose path satisfies `predicate`, all others)."""
  chosen: list[tuple[str, Any]] = []
  rest: list[tuple[str, Any]] = []
  for path, leaf in items(tree):
    (chosen if predicate(path) else rest).append((path, leaf))
  return from_items(chosen), from_items(rest)


def merge(*trees: Tree) -> dict:
  """Merges trees into one nested dict of all leaves; the inverse of `split`.

  Raises:
    ValueError: a path occurs in two trees.
  """
  merged: dict = {}
  for tree in trees:
    for path, leaf in items(tree):
      if path in merged:
        raise ValueError(f"{path} occurs in two of the merged trees")
      merged[path] = leaf
  return from_items(merged.items())


def replace(tree: Tree, leaves: Tree) -> dict:
  """The tree with leaves replaced by those that `leaves` has at the same path."""
  new = dict(items(leaves))
  return from_items((path, new.get(path, leaf)) for path, leaf in items(tree))


def cast(tree: Tree, dtype) -> dict:
  """Casts floating-point leaves to `dtype`; other leaves are unchanged."""
  return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def count(tree: Tree) -> int:
  """Number of parameters."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def size_bytes(tree: Tree) -> int:
  return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
