"""Source of Parquet files, such as those of Hugging Face datasets: one record per row.

A row is read with the row group it is in, of which a few stay in memory.
"""

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
import glob
import os
from pathlib import Path
import threading
from typing import TYPE_CHECKING, Any

from absl import logging
import numpy as np

from uae_jax.data import records
from uae_jax.data.file_sources import ends_fingerprint
from uae_jax.data.records import DEFAULT_FIELDS, Fields
from uae_jax.files import require_regular

if TYPE_CHECKING:
  import pyarrow as pa
  import pyarrow.parquet as pq

# Row groups, each with the columns that are read, and footers of files that stay in memory.
GROUPS_IN_MEMORY, FOOTERS_IN_MEMORY = 4, 256
# Reading one row reads its row group: larger ones are named.
LARGE_GROUP_BYTES = 16 * 2**20


class ParquetSource:
  """The rows of Parquet files: an image as bytes, struct `{bytes, path}` or path, and a text or a list of texts.

  Args:
    pattern: glob of the files.
    fields: names of the columns.

  Raises:
    ValueError: there is no file, one is torn, has no such column, or has the column in another type than the first
      file; the message names it.
  """

  def __init__(self, pattern: str, fields: Fields = DEFAULT_FIELDS):
    self._paths = sorted(glob.glob(pattern))
    if not self._paths:
      raise ValueError(f"{pattern}: no such file")
    with ThreadPoolExecutor(16) as pool:
      footers = list(pool.map(_footer, self._paths))
    schema = footers[0].schema.to_arrow_schema()
    self._columns = tuple(schema.names)
    image = _column(self._paths[0], schema, fields.image, ("image_base64", *records.IMAGE_FIELDS), "image")
    caption = _column(self._paths[0], schema, fields.caption, records.CAPTION_FIELDS, "caption")
    if image is None:
      raise ValueError(
        f"{self._paths[0]}: no column of images; it has {', '.join(schema.names)}: name one in data.image_field"
      )
    self._fields = Fields(image, caption or "", fields.choice)
    self._read = (image, caption) if caption else (image,)
    for path, footer in zip(self._paths[1:], footers[1:], strict=True):
      _require_same(path, footer.schema.to_arrow_schema(), self._paths[0], schema, self._fields)
    # One row per row group of all files: file, group in it; and the last record + 1 of each.
    groups = [(file, group) for file, footer in enumerate(footers) for group in range(footer.num_row_groups)]
    self._groups = np.asarray(groups, np.int64).reshape(-1, 2)
    counts = [footers[file].row_group(group).num_rows for file, group in groups]
    self._ends = np.cumsum(counts, dtype=np.int64)
    self._starts_of_files = np.cumsum([0, *(footer.num_rows for footer in footers)])[:-1]
    self._cache = _GroupCache()
    self._name_large_groups(footers)

  def _name_large_groups(self, footers: Sequence["pq.FileMetaData"]) -> None:
    groups = max(1, len(self._groups))
    size = sum(os.path.getsize(path) for path in self._paths) // groups
    if size > LARGE_GROUP_BYTES and len(self) > groups:
      logging.warning(
        "%s: a row group has %d rows and %d MB, all of which are read for one of them; `uae-jax data convert` writes "
        "files of which one record is read alone",
        self._paths[0],
        len(self) // groups,
        size // 2**20,
      )

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def __getitem__(self, index: int) -> dict:
    return records.read(self._row(index, self._read), self._folder(index), self._fields)

  def caption(self, index: int) -> str:
    if not self._fields.caption:
      return ""
    return records.caption_of(self._row(index, (self._fields.caption,)), self._fields)

  def content(self, index: int) -> tuple[bytes | Path, tuple[str, ...]]:
    row = self._row(index, self._read)
    captions = records.captions_of(row, self._fields)
    return records.image_content(row, self._folder(index), self._fields)[0], captions

  def _folder(self, index: int) -> Path:
    return Path(self._paths[self._group(index)[0]]).parent

  def _row(self, index: int, columns: tuple[str, ...]) -> dict[str, Any]:
    file, group, start = self._group(index)
    table = self._cache.read(self._paths[file], group, columns)
    return table.slice(index - start, 1).to_pylist()[0]

  def _group(self, index: int) -> tuple[int, int, int]:
    """(file, row group in it, first record of the row group) of a record."""
    i = int(np.searchsorted(self._ends, index, side="right"))
    file, group = map(int, self._groups[i])
    return file, group, int(self._ends[i - 1]) if i else 0

  def key(self, index: int) -> str:
    file = self._group(index)[0]
    return f"{self._paths[file]} row {index - self._starts_of_files[file]}"

  def fields(self) -> Sequence[str]:
    return self._columns

  def fingerprint(self) -> dict[str, int | str]:
    return {"records": len(self), **ends_fingerprint(self._paths)}


class _GroupCache:
  """The row groups and footers that were read last; a worker process that receives one starts with an empty one."""

  def __init__(self):
    self._lock = threading.Lock()
    self._tables: OrderedDict[tuple, pa.Table] = OrderedDict()
    self._footers: OrderedDict[str, pq.FileMetaData] = OrderedDict()

  def read(self, path: str, group: int, columns: tuple[str, ...]) -> "pa.Table":
    import pyarrow.parquet as pq

    key = (path, group, columns)
    with self._lock:
      if key in self._tables:
        self._tables.move_to_end(key)
        return self._tables[key]
      footer = self._footers.get(path)
    if footer is None:
      footer = _footer(path)
    # A reader of its own for each call, since readers are not safe in threads.
    with pq.ParquetFile(path, metadata=footer, memory_map=True) as file:
      table = file.read_row_group(group, list(columns), use_threads=False)
    with self._lock:
      self._footers[path], self._tables[key] = footer, table
      for kept, limit in ((self._footers, FOOTERS_IN_MEMORY), (self._tables, GROUPS_IN_MEMORY)):
        while len(kept) > limit:
          kept.popitem(last=False)
    return table

  def __reduce__(self):
    return _GroupCache, ()


def _footer(path: str) -> "pq.FileMetaData":
  """Reads the metadata of a file.

  Raises:
    ValueError: it is no whole Parquet file; the message names it.
  """
  import pyarrow as pa
  import pyarrow.parquet as pq

  require_regular(path)
  try:
    return pq.read_metadata(path)
  except (pa.ArrowException, OSError) as error:
    reason = " ".join(str(error).split())[:200]
    raise ValueError(f"{path} is not a whole Parquet file ({reason}): write it again, or remove it") from error


def _column(path: str, schema: "pa.Schema", name: str, names: tuple[str, ...], what: str) -> str | None:
  """The column `name`, or if that is "" the first of `names` that there is."""
  if name and name not in schema.names:
    raise ValueError(f"{path}: no column {name!r} (data.{what}_field); it has {', '.join(schema.names)}")
  found = name or next((name for name in names if name in schema.names), None)
  if found and schema.names.count(found) > 1:
    raise ValueError(f"{path}: column {found!r} occurs twice")
  return found


def _require_same(path: str, schema: "pa.Schema", first: str, expected: "pa.Schema", fields: Fields) -> None:
  for name in filter(None, (fields.image, fields.caption)):
    if schema.names.count(name) != 1:
      raise ValueError(f"{path}: no column {name!r}, which {first} has; it has {', '.join(schema.names)}")
    kinds = [str(found.field(name).type).replace("large_", "") for found in (schema, expected)]
    if kinds[0] != kinds[1]:
      raise ValueError(f"{path}: column {name!r} is {kinds[0]}, in {first} it is {kinds[1]}")
