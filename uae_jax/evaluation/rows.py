"""Works on the items of a task: rows that exist are kept, each failure is named, and a killed run loses one batch.

A row names the images that belong to it in `files`, paths below the output folder. If one of them is absent or damaged,
the row does not count.
"""

from collections.abc import Iterator, Sequence
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from uae_jax import files
from uae_jax.evaluation import generation
from uae_jax.evaluation.suites.spec import Prompt, SuiteError
from uae_jax.evaluation.suites.task import Run, Task


def file_name(shard: tuple[int, int]) -> str:
  """Name of the rows file of part I of N, which has a file of its own."""
  return "items.jsonl" if shard == (0, 1) else f"items-{shard[0]}-of-{shard[1]}.jsonl"


def read(out: Path) -> dict[str, dict[str, Any]]:
  """Reads the rows of all parts: key -> row. A last line without an end was being written, and does not count.

  Raises:
    SuiteError: another line is not a row.
  """
  rows: dict[str, dict[str, Any]] = {}
  for file in sorted(out.glob("items*.jsonl")):
    whole, _, _ = files.read_text(file).rpartition("\n")
    for number, line in enumerate(whole.split("\n") if whole else [], 1):
      try:
        row = json.loads(line)
      except (ValueError, RecursionError):
        row = None
      if not _is_row(row):
        raise SuiteError(f"{file}, line {number}: not a row of uae-jax evaluate: remove the line")
      rows[row["key"]] = row
  return rows


def _is_row(row: Any) -> bool:
  if not isinstance(row, dict) or not isinstance(row.get("key"), str):
    return False
  names = row.get("files", [])
  return isinstance(names, list) and all(isinstance(name, str) for name in names)


def image_files(out: Path, row: dict[str, Any]) -> list[Path]:
  """The images that belong to a row."""
  return [out / name for name in row.get("files", [])]


def whole(out: Path) -> dict[str, dict[str, Any]]:
  """Reads the rows whose images are all there and not damaged."""
  return {key: row for key, row in read(out).items() if all(map(generation.size_of, image_files(out, row)))}


def make(task: Task, run: Run, jobs: Sequence[Prompt], shard: tuple[int, int], batch_size: int) -> dict[str, str]:
  """Makes the rows of items.

  Args:
    task: the suite.
    run: model and options.
    jobs: items without a row.
    shard: (I, N), the part whose file the rows are appended to, and the number of parts.
    batch_size: items per call of the task; rows are written after each.

  Returns:
    Error messages by key, of items without a row.
  """
  failed: dict[str, str] = {}
  if not jobs:
    return failed
  file = run.out / file_name(shard)
  with (
    files.naming(file),
    open(file, "a+b", buffering=0) as stream,
    tqdm(total=len(jobs), desc=task.name, unit="item") as bar,
  ):
    _drop_torn_line(stream)
    for start in range(0, len(jobs), batch_size):
      batch = jobs[start : start + batch_size]
      for prompt, row in _attempt(task, run, batch):
        if isinstance(row, Exception):
          failed[prompt.key] = " ".join(f"{type(row).__name__}: {row}".split())
        else:
          files.write_line(stream, files.json_text({"key": prompt.key, **row}))
      bar.update(len(batch))
  return failed


def _attempt(task: Task, run: Run, batch: Sequence[Prompt]) -> Iterator[tuple[Prompt, Any]]:
  """Yields (item, its row, or the exception that prevented it)."""
  try:
    done = list(zip(batch, task.work(run, batch), strict=True))
  except Exception as error:  # Anything that fails for one item is that item's failure.
    if files.is_hopeless(error):
      raise
    if len(batch) == 1:
      yield batch[0], error
      return
    for prompt in batch:
      yield from _attempt(task, run, [prompt])
    return
  yield from done


def _drop_torn_line(stream: Any) -> None:
  """Cuts what follows the last line end of a file opened for appending."""
  stream.seek(0)
  stream.truncate(stream.read().rfind(b"\n") + 1)
