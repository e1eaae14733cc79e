"""Sources of records in files: JSON lines, ArrayRecord, and folders of images.

Opening one reads no image. Files that are not regular ones, such as named pipes, are refused, since reading them could
wait forever.
"""

import array
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
import glob
import os
from pathlib import Path
import zlib

from absl import logging
import numpy as np

from uae_jax.data import records
from uae_jax.data.images import read_image
from uae_jax.data.records import DEFAULT_FIELDS, Fields
from uae_jax.files import IMAGE_SUFFIXES, read_text, require_regular
from uae_jax.json_files import GIT_LFS

BOM = b"\xef\xbb\xbf"
# What other kinds of files begin with -> what to do about it.
OTHER_FORMATS = {
  b"[": "a JSON array, not JSON lines: write one object per line, as `jq -c '.[]'` does",
  b"\xff\xfe": "text in UTF-16: save it as UTF-8",
  b"\xfe\xff": "text in UTF-16: save it as UTF-8",
  b"\x1f\x8b": "compressed: run gunzip first",
  GIT_LFS: "a pointer of git-lfs, not the file itself: run `git lfs pull` in its repository",
  b"PAR1": "a Parquet file: name it as parquet:PATH",
}
CAPTION_SUFFIXES = (".txt", ".caption")
TAIL_BYTES = 65536


class JsonLinesSource:
  """A JSON lines file; lines are indexed once and read on demand, so the file may be larger than memory."""

  def __init__(self, path: str, fields: Fields = DEFAULT_FIELDS):
    self._path, self._fields = Path(path), fields
    require_regular(path)
    lengths, is_record, has_records, self._checksum = array.array("q"), bytearray(), False, 0
    with open(self._path, "rb") as file:
      start = len(BOM) if file.read(len(BOM)) == BOM else 0
      file.seek(start)
      for line in file:
        lengths.append(len(line))
        is_record.append(not line.isspace())
        if not has_records and is_record[-1]:
          has_records = True
          self._refuse_other_formats(line.lstrip())
        self._checksum = zlib.crc32(line, self._checksum)
    ends = start + np.cumsum(lengths, dtype=np.int64)
    # Blank lines are not records.
    lines = np.flatnonzero(np.frombuffer(is_record, np.bool_))
    self._line_numbers = 1 + lines
    self._spans = np.stack([ends - np.asarray(lengths, np.int64), ends], 1)[lines]

  def _refuse_other_formats(self, start: bytes) -> None:
    for magic, advice in OTHER_FORMATS.items():
      if start.startswith(magic):
        raise ValueError(f"{self._path} is {advice}")

  def __len__(self) -> int:
    return len(self._spans)

  def __getitem__(self, index: int) -> dict:
    return records.read(self._record(index), self._path.parent, self._fields)

  def caption(self, index: int) -> str:
    return records.caption_of(self._record(index), self._fields)

  def _record(self, index: int) -> dict:
    start, end = self._spans[index]
    with open(self._path, "rb") as file:
      file.seek(start)
      return records.parse(file.read(end - start))

  def key(self, index: int) -> str:
    return f"{self._path} line {self._line_numbers[index]}"

  def fields(self) -> Sequence[str]:
    return tuple(self._record(0))

  def fingerprint(self) -> dict[str, int | str]:
    return {"records": len(self), "checksum of all lines": f"{self._checksum:08x}"}


class ArrayRecordSource:
  """JSON objects stored as records of ArrayRecord files."""

  def __init__(self, pattern: str, fields: Fields = DEFAULT_FIELDS):
    import grain

    self._fields = fields
    self._paths = sorted(glob.glob(pattern))
    if not self._paths:
      raise ValueError(f"{pattern}: no such file")
    counts = num_records(self._paths)
    self._starts = np.cumsum([0, *counts])[:-1]
    self._folder = Path(self._paths[0]).parent
    # With the numbers of records, the files need not be opened again.
    self._data = grain.sources.ArrayRecordDataSource(
      [f"{path}[0:{count}]" for path, count in zip(self._paths, counts, strict=True)]
    )

  def __len__(self) -> int:
    return len(self._data)

  def __getitem__(self, index: int) -> dict:
    return records.read(records.parse(self._data[index]), self._folder, self._fields)

  def caption(self, index: int) -> str:
    return records.caption_of(records.parse(self._data[index]), self._fields)

  def key(self, index: int) -> str:
    file = int(np.searchsorted(self._starts, index, side="right")) - 1
    return f"{self._paths[file]} record {index - self._starts[file]}"

  def fields(self) -> Sequence[str]:
    return tuple(records.parse(self._data[0]))

  def fingerprint(self) -> dict[str, int | str]:
    return {"records": len(self), **ends_fingerprint(self._paths)}


def ends_fingerprint(paths: Sequence[str]) -> dict[str, int | str]:
  """Quantities that identify files of formats that end with an index: number, bytes, and a checksum of the ends."""
  checksum, size = 0, 0
  for path in paths:
    with open(path, "rb") as file:
      size += (length := file.seek(0, os.SEEK_END))
      file.seek(max(0, length - TAIL_BYTES))
      checksum = zlib.crc32(file.read(), zlib.crc32(os.path.basename(path).encode(), checksum))
  return {"files": len(paths), "bytes": size, "checksum of names and indices": f"{checksum:08x}"}


def num_records(paths: Sequence[str]) -> list[int]:
  """Counts the records of ArrayRecord files; opens them in threads, since each may be far away.

  Raises:
    ValueError: a file is torn or no ArrayRecord file; the message names it.
  """
  import grain

  def count(path: str) -> int:
    require_regular(path)
    try:
      return len(grain.sources.ArrayRecordDataSource([path]))
    except Exception as error:  # The reader raises several exception types for a torn file.
      reason = " ".join(str(error).split()) or "torn"
      raise ValueError(f"{path} is not a whole ArrayRecord file ({reason}): write it again, or remove it") from error

  with ThreadPoolExecutor(16) as pool:
    return list(pool.map(count, paths))


class FolderSource:
  """The images in a folder and its subfolders, linked ones too, sorted by path; hidden files are left out.

  The caption of `cat.jpg` is in `cat.txt` or `cat.caption`.
  """

  def __init__(self, folder: str):
    self._folder = Path(folder)
    if not self._folder.is_dir():
      raise ValueError(f"{folder}: no such folder")
    images: list[Path] = []
    others: Counter[str] = Counter()
    self._captions: dict[Path, Path] = {}
    for file in files_below(self._folder):
      suffix = file.suffix.lower()
      if suffix in IMAGE_SUFFIXES:
        images.append(file)
      elif suffix in CAPTION_SUFFIXES:
        self._captions[file.with_suffix("")] = file
      else:
        others[suffix or file.name] += 1
    self._paths = sorted(images)
    if not self._paths:
      raise ValueError(f"{folder}: no image ({', '.join(sorted(IMAGE_SUFFIXES))}) there")
    if others:
      kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
      logging.info("%s: %d images; not read: %s", folder, len(self._paths), kinds)

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, index: int) -> dict:
    caption = self.caption(index)
    return {"image": np.asarray(read_image(self._paths[index])), "caption": caption}

  def caption(self, index: int) -> str:
    file = self._captions.get(self._paths[index].with_suffix(""))
    if file is None:
      return ""
    require_regular(file)
    return read_text(file).strip()

  def key(self, index: int) -> str:
    return str(self._paths[index])

  def fields(self) -> Sequence[str]:
    return ()

  def fingerprint(self) -> dict[str, int | str]:
    # Names only: asking for the size of every file takes hours on a mounted bucket.
    checksum, start = 0, len(str(self._folder))
    for file in (*self._paths, *sorted(self._captions.values())):
      checksum = zlib.crc32(os.fsencode(str(file)[start:]) + b"\0", checksum)
    return {"records": len(self), "captions": len(self._captions), "checksum of names": f"{checksum:08x}"}


def files_below(folder: Path) -> Iterator[Path]:
  """Yields the files in a folder and its subfolders without hidden ones; follows links, and each folder once."""
  seen = set()
  for parent, folders, names in os.walk(folder, followlinks=True):
    # A link may lead to a folder above it.
    real = os.path.realpath(parent)
    # Sorted, so that every process finds the same.
    folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
    if real not in seen:
      yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))
    seen.add(real)
