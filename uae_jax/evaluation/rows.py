"""Rows of finished items, which a killed run leaves behind: it loses one batch. Each failure of a task is named.

A row names the images that belong to it in `files`, paths below the output folder. If one of them is absent or damaged,
the row does not count.
"""

from collections.abc import Sequence
import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from uae_jax import files
from uae_jax.evaluation import generation
from uae_jax.evaluation.attempts import attempt
from uae_jax.evaluation.suites.spec import Prompt, SuiteError
from uae_jax.evaluation.suites.task import Run, Task


def file_name(shard: tuple[int, int]) -> str:
  """Name of the rows file of part I of N, which has a file of its own."""
  return "items.jsonl" if shard == (0, 1) else f"items-{shard[0]}-of-{shard[1]}.jsonl"


def read(folder: Path) -> dict[str, dict[str, Any]]:
  """Reads the rows of all parts: key -> row. A last line without an end was being written, and does not count.

  Raises:
    SuiteError: another line is not a row.
  """
  rows: dict[str, dict[str, Any]] = {}
  for file in sorted(folder.glob("items*.jsonl")):
    whole, _, _ = files.read_text(file).rpartition("\n")
    for number, line in enumerate(whole.split("\n") if whole else [], 1):
      try:
        row = json.loads(line)
      except (ValueError, RecursionError):
        row = None
      if not _is_row(row):
        raise SuiteError(f"{file}, line {number}: not the row of an item: remove the line")
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


def whole(out: Path, folder: Path | None = None) -> dict[str, dict[str, Any]]:
  """Reads the rows whose images are all there and not damaged.

  Args:
    out: output folder.
    folder: where the rows are, if not there.
  """
  return {key: row for key, row in read(folder or out).items() if all(map(generation.size_of, image_files(out, row)))}


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
    files.open_lines(file) as stream,
    tqdm(total=len(jobs), desc=task.name, unit="item") as bar,
  ):
    for start in range(0, len(jobs), batch_size):
      batch = jobs[start : start + batch_size]
      for prompt, row in attempt(batch, lambda part: task.work(run, part)):
        if isinstance(row, Exception):
          failed[prompt.key] = " ".join(f"{type(row).__name__}: {row}".split())
        else:
          files.write_line(stream, files.json_text({"key": prompt.key, **row}))
      bar.update(len(batch))
  return failed
