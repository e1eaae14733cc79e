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
from uae_jax.data.stored_index import ByteStrings, Stamp, load_or_build, stamps
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
  """A JSON lines file; lines are indexed once and read on demand, so the file may be larger than memory.

  Args:
    path: the file.
    fields: names of the fields of image and captions.
    index_dir: folder of the index of a large file; "" is that of the file.
  """

  def __init__(self, path: str, fields: Fields = DEFAULT_FIELDS, index_dir: str = ""):
    self._path, self._fields = Path(path), fields
    require_regular(path)
    self._index = load_or_build(
      "lines", os.path.abspath(path), index_dir or self._path.parent, self._build, [str(self._path)]
    )

  def _build(self):
    noted = stamps([self._path])
    lengths, is_record, has_records, checksum = array.array("q"), bytearray(), False, 0
    with open(self._path, "rb") as file:
      start = len(BOM) if file.read(len(BOM)) == BOM else 0
      file.seek(start)
      for line in file:
        lengths.append(len(line))
        is_record.append(not line.isspace())
        if not has_records and is_record[-1]:
          has_records = True
          self._refuse_other_formats(line.lstrip())
        checksum = zlib.crc32(line, checksum)
    ends = start + np.cumsum(lengths, dtype=np.int64)
    # Blank lines are not records.
    lines = np.flatnonzero(np.frombuffer(is_record, np.bool_))
    spans = np.stack([ends - np.asarray(lengths, np.int64), ends], 1)[lines]
    return noted, {"spans": spans, "line_numbers": 1 + lines, "checksum": np.asarray([checksum])}

  def _refuse_other_formats(self, start: bytes) -> None:
    for magic, advice in OTHER_FORMATS.items():
      if start.startswith(magic):
        raise ValueError(f"{self._path} is {advice}")

  def __len__(self) -> int:
    return len(self._index["spans"])

  def __getitem__(self, index: int) -> dict:
    return records.read(self._record(index), self._path.parent, self._fields)

  def caption(self, index: int) -> str:
    return records.caption_of(self._record(index), self._fields)

  def content(self, index: int) -> tuple[bytes | Path, tuple[str, ...]]:
    record = self._record(index)
    captions = records.captions_of(record, self._fields)
    return records.image_content(record, self._path.parent, self._fields)[0], captions

  def _record(self, index: int) -> dict:
    start, end = map(int, self._index["spans"][index])
    with open(self._path, "rb") as file:
      file.seek(start)
      return self._parse(file.read(end - start))

  def _parse(self, line: bytes) -> dict:
    return records.parse(line)

  def key(self, index: int) -> str:
    return f"{self._path} line {self._index['line_numbers'][index]}"

  def fields(self) -> Sequence[str]:
    return tuple(self._record(0))

  def fingerprint(self) -> dict[str, int | str]:
    return {"records": len(self), "checksum of all lines": f"{int(self._index['checksum'][0]):08x}"}


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

  def content(self, index: int) -> tuple[bytes | Path, tuple[str, ...]]:
    record = records.parse(self._data[index])
    captions = records.captions_of(record, self._fields)
    return records.image_content(record, self._folder, self._fields)[0], captions

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

  Args:
    folder: the folder.
    index_dir: folder of the index of a large folder; "" is the one that `folder` is in.
  """

  def __init__(self, folder: str, index_dir: str = ""):
    self._folder = Path(folder)
    if not self._folder.is_dir():
      raise ValueError(f"{folder}: no such folder")
    path = os.path.abspath(folder)
    self._index = load_or_build("folder", path, index_dir or os.path.dirname(path), self._build)
    if not len(self):
      raise ValueError(f"{folder}: no image ({', '.join(sorted(IMAGE_SUFFIXES))}) there")

  def _build(self):
    folders: list[Stamp] = []
    images: list[str] = []
    captions: dict[str, str] = {}
    others: Counter[str] = Counter()
    # Relative, so that a million names fit into memory.
    prefix = len(os.path.join(self._folder, ""))
    for parent, names in folders_below(self._folder, folders):
      for name in names:
        stem, suffix = os.path.splitext(name)
        suffix, place = suffix.lower(), parent[prefix:]
        if suffix in IMAGE_SUFFIXES:
          images.append(os.path.join(place, name))
        elif suffix in CAPTION_SUFFIXES:
          captions[os.path.join(place, stem)] = os.path.join(place, name)
        else:
          others[suffix or name] += 1
    images.sort(key=lambda name: name.split(os.sep))
    if others:
      kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
      logging.info("%s: %d images; not read: %s", self._folder, len(images), kinds)
    checksum = 0
    for name in (*images, *sorted(captions.values(), key=lambda name: name.split(os.sep))):
      checksum = zlib.crc32(os.fsencode(os.sep + name) + b"\0", checksum)
    beside = [captions.get(os.path.splitext(name)[0], "") for name in images]
    return folders, {
      **ByteStrings.arrays("image", list(map(os.fsencode, images))),
      **ByteStrings.arrays("caption", list(map(os.fsencode, beside))),
      "num_captions": np.asarray([len(captions)]),
      "checksum": np.asarray([checksum]),
    }

  def __len__(self) -> int:
    return len(ByteStrings.of(self._index, "image"))

  def __getitem__(self, index: int) -> dict:
    caption = self.caption(index)
    return {"image": np.asarray(read_image(self._path("image", index))), "caption": caption}

  def caption(self, index: int) -> str:
    file = self._path("caption", index)
    if file == self._folder:
      return ""
    require_regular(file)
    return read_text(file).strip()

  def content(self, index: int) -> tuple[bytes | Path, tuple[str, ...]]:
    caption = self.caption(index)
    return self._path("image", index), (caption,) if caption else ()

  def _path(self, kind: str, index: int) -> Path:
    """The file of an image or a caption; the folder itself if there is none."""
    return self._folder / os.fsdecode(ByteStrings.of(self._index, kind)[index])

  def key(self, index: int) -> str:
    return str(self._path("image", index))

  def fields(self) -> Sequence[str]:
    return ()

  def fingerprint(self) -> dict[str, int | str]:
    # Names only: asking for the size of every file takes hours on a mounted bucket.
    return {
      "records": len(self),
      "captions": int(self._index["num_captions"][0]),
      "checksum of names": f"{int(self._index['checksum'][0]):08x}",
    }


def folders_below(folder: Path, noted: list[Stamp]) -> Iterator[tuple[str, list[str]]]:
  """Yields a folder and its subfolders with the names of the files in them, without what is hidden.

  Follows links, and each folder once. Appends to `noted` the stamp of each folder, taken before it is read: it changes
  with every file that is added, removed or renamed.
  """
  seen = set()
  pending = [os.fspath(folder)]
  while pending:
    parent = pending.pop()
    # A link may lead to a folder above it.
    real = os.path.realpath(parent)
    if real in seen:
      continue
    seen.add(real)
    noted.extend(stamps([parent]))
    with os.scandir(parent) as entries:
      found = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    yield parent, [name for name, is_folder in found if not is_folder]
    pending += [os.path.join(parent, name) for name, is_folder in reversed(found) if is_folder]
