"""Invertible changes of layout between the tensors of a checkpoint and the leaves of a model."""

import dataclasses
from typing import Any, Protocol

import numpy as np


class Move(Protocol):
  """An invertible change of an array's layout."""

  def apply(self, x: Any) -> Any:
    """Converts a tensor of the checkpoint to the layout of the model."""
    ...

  def invert(self, x: Any) -> Any:
    """The inverse of `apply`."""
    ...


@dataclasses.dataclass(frozen=True)
class Same:
  """The identity move."""

  def apply(self, x):
    return x

  def invert(self, x):
    return x


@dataclasses.dataclass(frozen=True)
class Permute:
  """Permutes axes as `np.transpose` does; `Permute((1, 0))` maps a torch weight [out, in] to our kernel [in, out]."""

  axes: tuple[int, ...]

  def apply(self, x):
    return np.transpose(x, self.axes)

  def invert(self, x):
    return np.transpose(x, tuple(np.argsort(self.axes)))


@dataclasses.dataclass(frozen=True)
class Reshape:
  """Reshapes from shape `theirs` to shape `ours`, keeping the order of elements."""

  theirs: tuple[int, ...]
  ours: tuple[int, ...]

  def apply(self, x):
    if x.shape != self.theirs:
      raise ValueError(f"shape {x.shape}, expected {self.theirs}")
    return x.reshape(self.ours)

  def invert(self, x):
    return x.reshape(self.theirs)


@dataclasses.dataclass(frozen=True)
class Then:
  """Applies several moves in order."""

  moves: tuple[Move, ...]

  def apply(self, x):
    for move in self.moves:
      x = move.apply(x)
    return x

  def invert(self, x):
    for move in reversed(self.moves):
      x = move.invert(x)
    return x


TRANSPOSE = Permute((1, 0))
CONV = Permute((2, 3, 1, 0))  # torch [out, in, kh, kw] -> [kh, kw, in, out]
