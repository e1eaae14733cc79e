"""Work on a batch of items, of which one that fails costs the others nothing."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from uae_jax import files

Item = TypeVar("Item")


def attempt(batch: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Any]]) -> Iterator[tuple[Item, Any]]:
  """Yields (item, its result, or the exception that prevented it).

  If work on several items fails, each is tried alone, which shows whose failure it is.

  Args:
    batch: the items.
    work: items -> one result each.

  Raises:
    OSError: one that every further item would raise too, such as a full disk.
  """
  if not batch:
    return
  try:
    done = list(zip(batch, work(batch), strict=True))
  except Exception as error:  # Anything that fails for one item is that item's failure.
    if files.is_hopeless(error):
      raise
    if len(batch) == 1:
      yield batch[0], error
      return
    for item in batch:
      yield from attempt([item], work)
    return
  yield from done
