"""Helpers for small files: paths, atomic writes, reading lines, and images as bytes or text."""

import base64
from collections.abc import Iterator
import contextlib
import errno
import fcntl
import glob
import io
import json
import os
from pathlib import Path
import re
import shutil
import stat
import tempfile
import threading
from typing import Any

# Suffixes of the files that count as images in a folder.
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
# One slash is enough: pathlib makes gs:/bucket of gs://bucket. A drive such as C: has one letter.
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
BUCKET = "gs://"
SURROGATES = re.compile("[\ud800-\udfff]")


def local_path(path: str | os.PathLike) -> str:
  """Expands `~`, which shells leave alone after `=`, and refuses addresses such as gs://bucket/folder.

  Every path that a user gives passes through here or through `input_path`: arguments of commands, fields of a config,
  arguments of the API.

  Raises:
    ValueError: the path is an address.
  """
  text = os.fspath(path)
  if URL.match(text):
    # Without user name and query, which may hold a secret.
    address = re.sub(r"//[^/]*@", "//", text.partition("?")[0])
    raise ValueError(f"{address}: an address, expected a path of this machine; copy or mount it first")
  return os.path.expanduser(text)


def is_in_cloud(path: str | os.PathLike) -> bool:
  """Whether a path is an address in Google Cloud Storage."""
  return os.fspath(path).startswith(BUCKET)


def input_path(path: str | os.PathLike) -> str:
  """A path that is only read: as `local_path`, or an address gs://BUCKET/NAME, which `cloud_storage.fetched` opens.

  Raises:
    ValueError: the path is any other address.
  """
  return os.fspath(path) if is_in_cloud(path) else local_path(path)


def cache_folder() -> Path:
  """The folder of what can be made again, copies and compiled programs: `UAE_JAX_CACHE`, or ~/.cache/uae_jax."""
  return Path(os.path.abspath(os.path.expanduser(os.environ.get("UAE_JAX_CACHE") or "~/.cache/uae_jax")))


def shown(path: str | os.PathLike) -> str:
  r"""A path as printable text: what is not UTF-8 in it is written as `\udcNN`."""
  return SURROGATES.sub(lambda match: f"\\u{ord(match[0]):04x}", os.fspath(path))


def json_text(value: Any, **options: Any) -> str:
  r"""JSON text that is valid UTF-8 for every file name.

  Python represents bytes of a file name that are not UTF-8 as surrogates. They are written as `\udcNN`, from which
  `json.loads` reads the same name.
  """
  return shown(json.dumps(value, ensure_ascii=False, **options))


def is_hopeless(error: BaseException) -> bool:
  """Whether every further file would fail for the same reason: a full or read-only disk, or a used-up quota."""
  return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
  """Writes a file atomically: it has either the old or the new content, even after a crash. Text is UTF-8.

  Anything that is not a regular file, such as /dev/stdout or a pipe, is written directly.
  """
  content = content.encode() if isinstance(content, str) else content
  try:
    _write_whole(path, content)
  except OSError as error:
    if error.errno is None:
      raise
    # The name of the temporary file would not tell which file it is about.
    raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def _write_whole(path: str | os.PathLike, content: bytes) -> None:
  if os.path.exists(path) and not os.path.isfile(path):
    with open(path, "wb") as stream:
      stream.write(content)
    return
  # A symbolic link stays a link. The temporary name is short: one derived from a long file name could be too long.
  target = os.path.realpath(path)
  temporary = os.path.join(os.path.dirname(target), f".{os.getpid()}-{threading.get_ident()}.tmp")
  try:
    with open(temporary, "wb") as stream:
      stream.write(content)
      stream.flush()
      os.fsync(stream.fileno())
    os.replace(temporary, target)
  except BaseException:
    Path(temporary).unlink(missing_ok=True)
    raise


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
  """Context whose file errors name a path, which those of a full disk do not."""
  try:
    yield
  except OSError as error:
    if error.errno is None or error.filename is not None:
      raise
    raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def write_line(stream: io.FileIO, line: str) -> None:
  """Writes a line at the end of a file that is open without a buffer; if it fails, nothing of the line is left."""
  data = memoryview(line.encode() + b"\n")
  start = stream.seek(0, os.SEEK_END) if stream.seekable() else None
  try:
    while data:
      data = data[stream.write(data) :]
  except BaseException:
    if start is not None:
      with contextlib.suppress(OSError):
        stream.truncate(start)
    raise


def open_lines(path: str | os.PathLike) -> io.FileIO:
  """Opens a file for `write_line`, after cutting a last line without an end, which a killed process left."""
  stream = open(path, "a+b", buffering=0)
  stream.seek(0)
  stream.truncate(stream.read().rfind(b"\n") + 1)
  return stream


def append_line(path: str | os.PathLike, line: str) -> None:
  """Appends a line to a file; see `write_line`."""
  with naming(path), open(path, "ab", buffering=0) as stream:
    write_line(stream, line)


@contextlib.contextmanager
def whole_folder(target: str | os.PathLike) -> Iterator[Path]:
  """Yields an empty folder that becomes `target` at the end; after an error or an interruption nothing is left.

  A process that is killed leaves a hidden folder `.NAME.partial-*`. The next call for the same target removes it; the
  folder of a process that is still writing is locked.

  Args:
    target: absent, or an empty folder.
  """
  target = Path(target).absolute()
  target.parent.mkdir(parents=True, exist_ok=True)
  prefix = f".{target.name}.partial-"
  for left in target.parent.glob(f"{glob.escape(prefix)}*"):
    with contextlib.suppress(OSError), open(left / "lock", "a") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      shutil.rmtree(left)
  partial = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
  try:
    with open(partial / "lock", "a") as lock:
      with contextlib.suppress(OSError):  # Some network file systems have no locks.
        fcntl.flock(lock, fcntl.LOCK_EX)
      content = partial / "content"
      content.mkdir()
      yield content
      if target.exists():
        target.rmdir()
      content.rename(target)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def require_regular(path: str | os.PathLike) -> None:
  """Checks that a path is a file, or a link to one: opening a named pipe or a device can wait forever.

  Raises:
    FileNotFoundError: nothing is there.
    ValueError: it is a folder, pipe, socket or device; the message names it.
  """
  mode = os.stat(path).st_mode
  if not stat.S_ISREG(mode):
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}
    raise ValueError(f"{os.fspath(path)} is a {kinds.get(stat.S_IFMT(mode), 'device')}, expected a file")


def read_text(path: str | os.PathLike) -> str:
  r"""Reads a UTF-8 text file, with or without a byte order mark; \r\n becomes \n.

  Raises:
    ValueError: the file is not UTF-8; the message names it.
  """
  try:
    return Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); expected a text file in UTF-8") from error


def read_lines(path: str | os.PathLike) -> list[str]:
  r"""Reads the lines of a UTF-8 text or JSON lines file, with or without a byte order mark.

  Only \n and \r\n end a line: U+2028, U+0085 and others that `str.splitlines` splits at may occur in JSON strings.

  Raises:
    ValueError: the file is not UTF-8; the message names it.
  """
  lines = read_text(path).split("\n")
  return lines if lines[-1] else lines[:-1]


def image_bytes(image: Any, kind: str = "PNG", **options: Any) -> bytes:
  """Encodes an image.

  Args:
    image: PIL image, or uint8[H, W, 3].
    kind: "PNG" or "JPEG".
    options: options of PIL's writer, such as `quality`.
  """
  from PIL import Image

  if not isinstance(image, Image.Image):
    image = Image.fromarray(image)
  data = io.BytesIO()
  image.save(data, kind, **options)
  return data.getvalue()


def png_base64(image: Any) -> str:
  """Encodes a PIL image or uint8[H, W, 3] as a PNG in base64."""
  return base64.b64encode(image_bytes(image)).decode()


def data_uri(image: Any, kind: str = "PNG", **options: Any) -> str:
  """Encodes an image as a data URI; arguments as for `image_bytes`."""
  return f"data:image/{kind.lower()};base64,{base64.b64encode(image_bytes(image, kind, **options)).decode()}"
