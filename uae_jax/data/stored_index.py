"""Indexes of large inputs: arrays that are built once, kept in a hidden folder beside the data, and memory-mapped.

An index is used again as long as the files and folders it was built from have the same sizes and times.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import contextlib
import fcntl
import json
import os
from pathlib import Path
import shutil
import time
import zlib

from absl import logging
import numpy as np

from uae_jax.files import json_text, whole_folder, write_whole

FOLDER = ".uae_jax_index"
STAMPS_FILE = "stamps.json"
# An index that is built faster than this is not stored.
LEAST_SECONDS = 1.0

# Path, size in bytes, and time of the last change in ns.
Stamp = tuple[str, int, int]


class StoredIndex(Mapping[str, np.ndarray]):
  """Named arrays, memory-mapped where they are stored; a worker process that receives one maps them itself.

  Args:
    folder: folder of one .npy file per array, or None.
    arrays: the arrays, if they are not stored.
  """

  def __init__(self, folder: Path | None, arrays: Mapping[str, np.ndarray] | None = None):
    self._folder = folder
    if folder is not None:
      arrays = {file.stem: np.load(file, mmap_mode="r") for file in sorted(folder.glob("*.npy"))}
    self._arrays = arrays or {}

  def __getitem__(self, name: str) -> np.ndarray:
    return self._arrays[name]

  def __iter__(self):
    return iter(self._arrays)

  def __len__(self) -> int:
    return len(self._arrays)

  def __reduce__(self):
    return StoredIndex, (self._folder, None if self._folder else self._arrays)


class ByteStrings:
  """A list of byte strings in two arrays: `bytes` uint8[total] and `ends` int64[count]."""

  def __init__(self, data: np.ndarray, ends: np.ndarray):
    self._bytes, self._ends = data, ends

  @staticmethod
  def arrays(name: str, strings: Sequence[bytes]) -> dict[str, np.ndarray]:
    """The arrays `<name>_bytes` and `<name>_ends` of an index."""
    ends = np.cumsum(np.fromiter(map(len, strings), np.int64, len(strings)), dtype=np.int64)
    return {f"{name}_bytes": np.frombuffer(b"".join(strings), np.uint8), f"{name}_ends": ends}

  @classmethod
  def of(cls, index: Mapping[str, np.ndarray], name: str) -> "ByteStrings":
    return cls(index[f"{name}_bytes"], index[f"{name}_ends"])

  def __len__(self) -> int:
    return len(self._ends)

  def __getitem__(self, i: int) -> bytes:
    return bytes(self._bytes[self._ends[i - 1] if i else 0 : self._ends[i]])


def stamps(paths: Iterable[str | os.PathLike]) -> list[Stamp]:
  """Reads size and time of files and folders, in threads, since each may be far away."""

  def stamp(path: str) -> Stamp:
    found = os.stat(path)
    return path, found.st_size, found.st_mtime_ns

  with ThreadPoolExecutor(16) as pool:
    return list(pool.map(stamp, map(os.fspath, paths)))


def load_or_build(
  kind: str,
  source: str,
  place: str | os.PathLike,
  build: Callable[[], tuple[list[Stamp], dict[str, np.ndarray]]],
  paths: Sequence[str] | None = None,
) -> StoredIndex:
  """Returns the stored index of a source, or builds it, and stores it if that took long.

  Of several processes on one machine that need the same index, one builds it.

  Args:
    kind: what is indexed and how; other kinds do not read this one's index.
    source: absolute name of the source.
    place: folder in which the folder of the indexes lies.
    build: returns the stamps of what is read, taken before it is read, and the arrays.
    paths: the files of the source; None takes those of the stored index.
  """
  folder = Path(place) / FOLDER / f"{kind}-{zlib.crc32(os.fsencode(source)):08x}"
  found = _load(folder, source, paths)
  if found is not None:
    return found
  with _locked(folder.with_suffix(".lock")):
    found = _load(folder, source, paths)
    if found is not None:
      return found
    start = time.monotonic()
    noted, arrays = build()
    if time.monotonic() - start < LEAST_SECONDS:
      return StoredIndex(None, arrays)
    try:
      shutil.rmtree(folder, ignore_errors=True)
      with whole_folder(folder) as partial:
        for name, values in arrays.items():
          np.save(partial / f"{name}.npy", values)
        about = {"source": source, "stamps": noted, "checksums": _checksums(arrays)}
        write_whole(partial / STAMPS_FILE, json_text(about))
    except OSError as error:
      # A process on another machine may have been faster.
      found = _load(folder, source, paths)
      if found is None:
        logging.warning("%s is indexed at every start, since %s; data.index_dir names another place", source, error)
      return found or StoredIndex(None, arrays)
  return StoredIndex(folder)


def _load(folder: Path, source: str, paths: Sequence[str] | None) -> StoredIndex | None:
  """The index in a folder, if it is whole, of this source and up to date."""
  try:
    noted = json.loads((folder / STAMPS_FILE).read_bytes())
    known = [tuple(stamp) for stamp in noted["stamps"]]
    names = [path for path, *_ in known]
    if noted["source"] != source or (paths is not None and names != list(paths)) or stamps(names) != known:
      return None
    index = StoredIndex(folder)
    return index if _checksums(index) == noted["checksums"] else None
  except Exception:  # NumPy's reader of a damaged header raises anything that a parser of Python can.
    return None


def _checksums(arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
  """Checksum of each array: a damaged index would read other records without an error."""
  return {name: zlib.crc32(np.ascontiguousarray(values).data) for name, values in sorted(arrays.items())}


@contextlib.contextmanager
def _locked(path: Path):
  """Holds a lock where the place can be written to and has locks."""
  with contextlib.ExitStack() as stack:
    with contextlib.suppress(OSError):
      if path.parent.exists() or os.access(path.parent.parent, os.W_OK):
        path.parent.mkdir(exist_ok=True)
        fcntl.flock(stack.enter_context(open(path, "a")), fcntl.LOCK_EX)
    yield
