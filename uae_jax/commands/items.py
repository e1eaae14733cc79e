"""Commands of many items: one bad item is named on stderr and counted, and the others are done.

    batches of items -> read each -> work on the readable ones together -> write each result

An item may fail in every one of these steps. If work on a batch fails, each of its items is tried alone.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
import os
from pathlib import Path
import sys
from typing import Any, TypeVar

from uae_jax import files, outputs
from uae_jax.commands import command_line
from uae_jax.evaluation.attempts import attempt

Item = TypeVar("Item")


class OutputError(OSError):
  """Raised when the file that all results go to cannot be written; ends the command."""


class Items:
  """The failures of one run of a command.

  Attributes:
    failed: names of the items that failed.
  """

  def __init__(self, command: str):
    self.failed: list[str] = []
    self._command = command

  @contextlib.contextmanager
  def item(self, name: object) -> Iterator[None]:
    """What raises inside is reported as the failure of the item, unless all further items would fail as well."""
    try:
      yield
    except Exception as error:  # PIL, tokenizers, JAX and the file system raise many types.
      if isinstance(error, OutputError) or files.is_hopeless(error):
        raise
      self.fail(name, command_line.one_line(error))

  def fail(self, name: object, problem: str) -> None:
    """Counts an item as failed and names it on stderr."""
    from tqdm import tqdm

    shown = files.shown(str(name))
    self.failed.append(shown)
    line = problem if shown in problem else f"{shown}: {problem}"
    tqdm.write(f"uae-jax {self._command}: error: {line}", file=sys.stderr)

  def results(
    self,
    items: Sequence[Item],
    read: Callable[[Item], Any],
    work: Callable[[list[int], list[Any]], Sequence[Any]],
    *,
    batch_size: int,
    unit: str,
    indices: Sequence[int] | None = None,
  ) -> Iterator[tuple[int, Item, Any, Any]]:
    """Yields (index, item, what was read, result) of every item that did not fail, and shows a progress bar.

    Args:
      items: all items; their string is their name in messages.
      read: prepares one item.
      work: (indices into `items`, what was read of them) -> one result each.
      batch_size: items per call of `work`.
      unit: unit of the progress bar.
      indices: those of the items that are still to be done; default: all.
    """
    from tqdm import tqdm

    indices = range(len(items)) if indices is None else indices
    with tqdm(total=len(indices), desc=self._command, unit=unit, file=sys.stderr) as bar:
      for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size]
        ready: dict[int, Any] = {}
        for index in batch:
          with self.item(items[index]):
            ready[index] = read(items[index])
        for index, result in attempt(list(ready), functools.partial(_work_on, work, ready)):
          if isinstance(result, Exception):
            self.fail(items[index], command_line.one_line(result))
          else:
            yield index, items[index], ready[index], result
        bar.update(len(batch))


def _work_on(work: Callable[[list[int], list[Any]], Sequence[Any]], ready: dict[int, Any], indices: Sequence[int]):
  return work(list(indices), [ready[index] for index in indices])


class JsonLines:
  """A file that JSON objects are appended to, one per line; it is opened with the first one.

  A last line without an end, which a killed process left, is cut.

  Args:
    path: the file; "-" is stdout. A pipe is possible.
  """

  def __init__(self, path: Path):
    self.path = path
    self._stream: Any = None

  def write(self, record: dict) -> None:
    """Appends an object; it is in the file when this returns.

    Raises:
      OutputError: the file cannot be written.
    """
    try:
      if self._stream is None:
        self._stream = sys.stdout if self.path == Path("-") else self._open()
      line = files.json_text(record)
      if self._stream is sys.stdout:
        print(line, flush=True)
      else:
        files.write_line(self._stream, line)
    except OSError as error:
      raise OutputError(error.errno, error.strerror, os.fspath(self.path)) from error

  def _open(self):
    self.path.parent.mkdir(parents=True, exist_ok=True)
    return open(self.path, "wb", buffering=0) if outputs.is_stream(self.path) else files.open_lines(self.path)

  def close(self) -> None:
    if self._stream not in (None, sys.stdout):
      self._stream.close()
