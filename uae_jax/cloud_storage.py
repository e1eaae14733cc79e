"""Files in Google Cloud Storage, named `gs://BUCKET/NAME`: copied once to this machine and read from there.

Results of commands are written on this machine, and copied to the bucket when the command ends.

A copy is `CACHE/gs/BUCKET/NAME`; its time is the generation of the object, which changes with every write to it. What
has the generation and size of its object is not copied again. `CACHE` is `files.cache_folder()`. Credentials are the
default ones of Google Cloud, and none where `STORAGE_EMULATOR_HOST` names an emulator.
"""

import base64
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
import contextlib
import dataclasses
import fcntl
import glob
import os
from pathlib import Path
import re
import shutil
import tempfile
import threading
from typing import Any

from absl import logging

from uae_jax.files import BUCKET, cache_folder, is_in_cloud

EMULATOR_VARIABLE = "STORAGE_EMULATOR_HOST"
NUM_DOWNLOADS = 16
TIMEOUT_SECONDS = 60.0
# Somebody waits for an outline: it gives up sooner, and reads no more than this of the end of an object.
OUTLINE_TIMEOUT_SECONDS = 5.0
OUTLINE_END_BYTES = 2**20
# Larger objects are read in parts at the same time, which takes one request more.
PARTS_FROM_BYTES = 100 * 2**20


def cache() -> Path:
  """The folder with the copies."""
  return cache_folder() / "gs"


def fetched(path: str | os.PathLike) -> str:
  """Copies what an address names to this machine, unless it is there already.

  Args:
    path: `gs://BUCKET/NAME` of an object, of a folder with all below it, or a glob; or any path of this machine.

  Returns:
    The path of the copy, a glob for a glob; a path of this machine as it is.

  Raises:
    FileNotFoundError: no object has this name.
    ValueError: the bucket cannot be read, or what arrived is not the object; the message names the address.
  """
  text = os.fspath(path)
  if not is_in_cloud(text):
    return text
  name = _name(text)
  with _locked(name.partition("/")[0]):
    _remove_torn(name)
    objects = _list(name)
    if not objects:
      raise FileNotFoundError(f"gs://{name}: no such object or folder in the bucket")
    _copy(objects)
    # Deleted objects are not read. What is hidden, such as an index of the data, is no copy.
    wanted = {str(_copy_of(found)) for found in objects}
    for left in list(_copies(name)):
      if left not in wanted:
        os.remove(left)
  copy = str(cache() / name)
  # What is no part of a glob may look like one.
  return os.path.join(glob.escape(str(cache())), name) if glob.has_magic(name) else copy


def exists(path: str) -> bool:
  """Whether an address names an object, a folder, or is a glob of one.

  Raises:
    ValueError: the bucket cannot be read.
  """
  return bool(_list(_name(path)))


def copy_of(address: str) -> Path:
  """The path that the copy of an object has.

  Raises:
    ValueError: the address names none.
  """
  return _copy_of(_name(address))


def fetch_missing(path: Path) -> bool:
  """Copies the object of a path below `cache()` that is not there; returns whether the path is there now.

  Raises:
    ValueError: the bucket cannot be read.
  """
  place = os.path.normpath(path)
  if os.path.exists(place):
    return True
  name = os.path.relpath(place, cache())
  if name.startswith(os.pardir) or os.sep not in name:
    return False
  try:
    with _reported(name):
      info = _file_system().info(name)
  except FileNotFoundError:
    return False
  if info["type"] == "file":
    _download(name, info)
  return info["type"] == "file"


@contextlib.contextmanager
def outline(address: str, read: Collection[str]) -> Iterator[Path]:
  """Yields a folder of this machine that looks like one of a bucket, for what reads names, times and ends of files.

  Its files have the sizes and times of the objects, and no content but for the last MiB of some; the rest reads as
  zeros and takes no space on the disk. It is gone afterwards.

  Args:
    address: `gs://BUCKET/NAME` of a folder.
    read: names of the files, in any folder, of which the end is read.

  Raises:
    FileNotFoundError: there is no such folder.
    ValueError: the bucket cannot be read; the message names the address.
  """
  name = _name(address)
  objects = {path: info for path, info in _list(name, OUTLINE_TIMEOUT_SECONDS).items() if path != name}
  if not objects:
    raise FileNotFoundError(f"gs://{name}: no such folder in the bucket")
  with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(NUM_DOWNLOADS) as pool:
    ends = {path: pool.submit(_end, path, info) for path, info in objects.items() if path.rpartition("/")[2] in read}
    for path, info in objects.items():
      copy = Path(folder) / _copy_of(path).relative_to(cache() / name)
      start, content = ends[path].result() if path in ends else (int(info["size"]), b"")
      copy.parent.mkdir(parents=True, exist_ok=True)
      with copy.open("wb") as stream:
        stream.truncate(start)
        stream.seek(start)
        stream.write(content)
      os.utime(copy, (info["mtime"].timestamp(),) * 2)
    yield Path(folder)


@dataclasses.dataclass(frozen=True)
class _Result:
  """A result that belongs in a bucket.

  Attributes:
    folder: folder of this machine that stands for `parent`; it has the result and what belongs to it.
    parent: `BUCKET/NAME` of the folder of the result.
    before: what the bucket had of it: `BUCKET/NAME` of an object -> what the bucket said about it.
  """

  folder: Path
  parent: str
  before: Mapping[str, dict]


# The results of the command that runs, or of the last one; see `writing_results`.
_results: list[_Result] = []
_is_writing = False


def result(address: str) -> Path:
  """A path of this machine for a result in a bucket, with what the bucket has of it; see `writing_results`.

  Args:
    address: `gs://BUCKET/NAME` of an object or of a folder. Objects beside it belong to it if their names begin with
      its name up to the last dot, and a dot: `results.csv` to `results.json`.

  Raises:
    ValueError: the bucket cannot be read or written; the message names the address.
  """
  name = _name(address)
  parent, _, last = name.rpartition("/")
  if not parent:
    raise ValueError(f"{address}: expected gs://BUCKET/NAME, a place within the bucket")
  if not _is_writing:
    raise ValueError(f"{address}: only the command line uae-jax writes to buckets; name a path of this machine")
  stem = Path(last).stem
  with _reported(name, "written"):
    files = _file_system()
    # What cannot be written is said before the work.
    files.pipe_file(f"{parent}/.{last}.tmp", b"")
    files.rm_file(f"{parent}/.{last}.tmp")
  with _reported(name):
    found = files.find(parent, prefix=stem, detail=True)
  first = {path: path[len(parent) + 1 :].partition("/")[0] for path in _objects(found)}
  before = {path: found[path] for path, part in first.items() if part == last or part.startswith(f"{stem}.")}
  _copy(before)
  folder = Path(tempfile.mkdtemp(prefix="uae_jax_")).resolve()
  _results.append(_Result(folder, parent, before))
  for path in before:
    copy = folder / path[len(parent) + 1 :]
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(_copy_of(path), copy)
  return folder / last


@contextlib.contextmanager
def writing_results() -> Iterator[None]:
  """Context at whose end, also after an error, what was written to `result` is in its bucket.

  An object is whole or absent. The one that was written last comes last, so that it never names one that is missing.

  Raises:
    ValueError: it could not be written; the message says where it is on this machine.
  """
  global _is_writing
  _results.clear()
  _is_writing = True
  try:
    yield
  finally:
    _is_writing = False
    for one in list(_results):
      _upload(one)


def has_results() -> bool:
  """Whether the command writes to a bucket."""
  return bool(_results)


def shown(text: str) -> str:
  """A message with the addresses of results in place of their paths on this machine."""
  for one in _results:
    text = text.replace(str(one.folder), f"gs://{one.parent}")
  return text


def _upload(one: _Result) -> None:
  """Writes what has changed of a result to the bucket, and deletes there what is gone."""
  files = {f"{one.parent}/{file.relative_to(one.folder)}": file for file in one.folder.rglob("*") if file.is_file()}
  changed = [
    name for name, file in files.items() if name not in one.before or not _is_copy(file.stat(), one.before[name])
  ]
  changed.sort(key=lambda name: files[name].stat().st_mtime_ns)

  def upload(name: str) -> None:
    with _reported(name, "written"):
      _file_system().put_file(str(files[name]), name, consistency="md5")

  try:
    with ThreadPoolExecutor(NUM_DOWNLOADS) as pool:
      list(pool.map(upload, changed[:-1]))
    for name in changed[-1:]:
      upload(name)
    for name in one.before.keys() - files.keys():
      with _reported(name, "deleted"):
        _file_system().rm_file(name)
  except (ValueError, FileNotFoundError) as error:
    _results.remove(one)  # The message names the path.
    raise ValueError(f"{error}; the results are in {one.folder}") from error
  shutil.rmtree(one.folder)


def _end(name: str, info: Mapping[str, Any]) -> tuple[int, bytes]:
  """The last bytes of an object, and where they begin."""
  start = max(0, int(info["size"]) - OUTLINE_END_BYTES)
  with _reported(name):
    # An empty object has no range that could be asked for.
    return start, _file_system(OUTLINE_TIMEOUT_SECONDS).cat_file(name, start=start or None)


def _name(address: str) -> str:
  """`BUCKET/NAME` of an address.

  Raises:
    ValueError: it names no bucket.
  """
  name = re.sub("/+", "/", address[len(BUCKET) :]).strip("/")
  if not name or any(part in (".", "..") for part in name.split("/")):
    raise ValueError(f"{address}: expected gs://BUCKET/NAME")
  return name


def _copy_of(name: str) -> Path:
  """The path of the copy of an object `BUCKET/NAME`.

  Raises:
    ValueError: the name cannot be that of a file, or would be one outside of the folder of copies.
  """
  if any(part in ("", ".", "..") for part in name.split("/")):
    raise ValueError(f"gs://{name}: an object whose name is no path: rename it")
  return cache() / name


def _copies(name: str) -> Iterator[str]:
  """The files that are there for a folder or glob `BUCKET/NAME`, without hidden ones."""
  if glob.has_magic(name):
    found = glob.glob(os.path.join(glob.escape(str(cache())), name), recursive=True)
    yield from filter(os.path.isfile, found)
  for parent, folders, names in os.walk(cache() / name):
    folders[:] = [folder for folder in folders if not folder.startswith(".")]
    yield from (os.path.join(parent, name) for name in names if not name.startswith("."))


def _remove_torn(name: str) -> None:
  """Removes what killed processes left of their downloads; a living process holds a lock on its own."""
  folder = cache() / name if not glob.has_magic(name) else cache() / name.partition("/")[0]
  for file in (folder if folder.is_dir() else folder.parent).rglob(".*.tmp"):
    with contextlib.suppress(OSError), file.open("rb") as stream:
      fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
      file.unlink()


@contextlib.contextmanager
def _locked(bucket: str) -> Iterator[None]:
  """Lets the processes of a machine copy one after another, so that each object is copied once."""
  lock = cache() / f".{bucket}.lock"
  lock.parent.mkdir(parents=True, exist_ok=True)
  with lock.open("a") as stream:
    with contextlib.suppress(OSError):  # Some network file systems have no locks.
      fcntl.flock(stream, fcntl.LOCK_EX)
    yield


def _file_system(timeout: float = TIMEOUT_SECONDS) -> Any:
  try:
    from gcsfs.core import GCSFileSystem
  except ImportError as error:
    raise ValueError("gs:// needs the package gcsfs: pip install 'uae_jax[gcs]'") from error
  # Made anew each time, as a process that was forked may not use the one of its parent; gcsfs keeps one per process.
  token = "anon" if os.environ.get(EMULATOR_VARIABLE) else None
  return GCSFileSystem(token=token, use_listings_cache=False, requests_timeout=timeout)


def _list(name: str, timeout: float = TIMEOUT_SECONDS) -> Mapping[str, dict]:
  """The objects that a name stands for: `BUCKET/NAME` -> what the bucket says about it."""
  with _reported(name):
    files = _file_system(timeout)
    found = (files.glob if glob.has_magic(name) else files.find)(name, detail=True)
  return _objects(found)


def _objects(found: Mapping[str, dict]) -> dict[str, dict]:
  """What is a file of what was listed; objects that end with a slash stand for empty folders."""
  return {path: info for path, info in found.items() if info["type"] == "file" and not info["name"].endswith("/")}


def _copy(objects: Mapping[str, dict]) -> None:
  """Copies those of some objects that are not there yet."""
  stale = {name: info for name, info in objects.items() if not _is_current(_copy_of(name), info)}
  if not stale:
    return
  if len(stale) > 1:
    size = sum(int(info["size"]) for info in stale.values()) / 1e9
    logging.info("copying %d objects of %s, %.3g GB, to %s", len(stale), next(iter(stale)), size, cache())
  with ThreadPoolExecutor(NUM_DOWNLOADS) as pool:
    # The first error ends the others that have not begun.
    try:
      for _ in pool.map(_download, stale, stale.values()):
        pass
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise


def _time(info: Mapping[str, Any]) -> int:
  """The generation of an object, microseconds in Google's storage, as a time in ns."""
  return 1000 * int(info["generation"])


def _is_current(copy: Path, info: Mapping[str, Any]) -> bool:
  try:
    found = copy.stat()
  except (FileNotFoundError, NotADirectoryError):
    return False
  return _is_copy(found, info)


def _is_copy(file: os.stat_result, info: Mapping[str, Any]) -> bool:
  return file.st_size == int(info["size"]) and file.st_mtime_ns == _time(info)


def _download(name: str, info: Mapping[str, Any]) -> None:
  copy = _copy_of(name)
  temporary = copy.with_name(f".{os.getpid()}-{threading.get_ident()}.tmp")
  try:
    copy.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("wb") as held:
      with contextlib.suppress(OSError):  # Some network file systems have no locks.
        fcntl.flock(held, fcntl.LOCK_EX)
      with _reported(name):
        _file_system().get_file(name, str(temporary), concurrency=4 if int(info["size"]) > PARTS_FROM_BYTES else 1)
    if checksum(temporary) != info["crc32c"]:
      raise ValueError(f"gs://{name}: what arrived is not the object, or it changed meanwhile: start again")
    os.utime(temporary, ns=(_time(info), _time(info)))
    temporary.replace(copy)
  finally:
    temporary.unlink(missing_ok=True)


def checksum(file: Path) -> str:
  """The CRC32C of a file as Google's storage writes it, in base64."""
  import google_crc32c

  value = google_crc32c.Checksum()
  with file.open("rb") as stream:
    while block := stream.read(2**20):
      value.update(block)
  return base64.b64encode(value.digest()).decode()


@contextlib.contextmanager
def _reported(name: str, done: str = "read") -> Iterator[None]:
  """Turns the errors of the client into one line; it has tried six times over half a minute where that may help."""
  try:
    yield
  except FileNotFoundError as error:
    raise FileNotFoundError(f"gs://{name}: no such object or bucket") from error
  except OSError as error:
    if error.errno is not None and error.filename is not None:  # An error of this machine, such as a full disk.
      raise
    raise ValueError(f"gs://{name}: cannot be {done} ({_reason(error)})") from error
  except Exception as error:  # The client raises exceptions of four libraries.
    raise ValueError(f"gs://{name}: cannot be {done} ({_reason(error)})") from error


def _reason(error: Exception) -> str:
  if isinstance(error, TimeoutError):
    return "it does not answer"
  return " ".join(f"{type(error).__name__}: {error}".split())[:200]
