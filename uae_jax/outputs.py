"""Checks of the places that results go to, before any work: a typing mistake costs seconds, and no file of another."""

from collections.abc import Iterable
import contextlib
import os
from pathlib import Path
import tempfile

STDOUT = Path("-")
# What a command of many items appends to the name of its result, for the folder of items that are done until then.
UNFINISHED = ".unfinished"
# How the files begin that commands write; earlier results of this kind are replaced.
JSON, PAGE, TABLE = b"{", b"<", b"reference,"


def is_stream(path: Path) -> bool:
  """Whether a result can only be written from start to end: stdout, a pipe or a device."""
  return path == STDOUT or (path.exists() and not path.is_file() and not path.is_dir())


def require_file(path: Path, flag: str, begins: bytes, inputs: Iterable[Path] = ()) -> None:
  """Checks that a result can be written to a file; writes nothing.

  Args:
    path: the file; "-" is stdout, and what is no regular file, such as a pipe, is only opened when there is a result.
    flag: the argument that names it, for messages.
    begins: how an earlier result begins; any other file that is not empty is left alone.
    inputs: files that the command reads.

  Raises:
    ValueError: the folder cannot be written, or something else is there.
  """
  if is_stream(path):
    return
  if path.is_dir():
    raise ValueError(f"{flag} {path} is a folder, expected a file")
  require_folder(path.parent, flag, path)
  if not path.exists():
    return
  for other in inputs:
    with contextlib.suppress(OSError):
      if path.samefile(other):
        raise ValueError(f"{flag} {path} is read by this command: choose another name")
  try:
    with open(path, "rb") as stream:
      start = stream.read(64).lstrip()
  except OSError as error:
    raise ValueError(f"{flag} {path} cannot be replaced ({error.strerror})") from error
  if start and not start.startswith(begins):
    raise ValueError(f"{flag} {path} is not an earlier result: nothing is overwritten, choose another name")


def require_folder(folder: Path, flag: str, target: Path | None = None) -> None:
  """Checks that files can be written in a folder, or that it can be made; leaves nothing behind.

  Args:
    folder: the folder.
    flag: the argument that names it, for messages.
    target: what the argument names, if it is not the folder itself.

  Raises:
    ValueError: it is a file, or nothing can be written there.
  """
  target = folder if target is None else target
  folder = Path(os.path.abspath(folder))
  there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
  if not there.is_dir():
    raise ValueError(f"{flag} {target}: {there} is not a folder")
  try:
    with tempfile.TemporaryFile(dir=there):
      pass
  except OSError as error:
    raise ValueError(f"{flag} {target}: nothing can be written in {there} ({error.strerror})") from error


def require_own(folder: Path, flag: str, index: str, names: Iterable[str]) -> None:
  """Checks that files which are about to be written replace those of an earlier call only.

  Args:
    folder: output folder.
    flag: the argument that names it, for messages.
    index: file that every earlier call has left there.
    names: files that will be written.

  Raises:
    ValueError: the folder has one of the files, but no index, not even an unfinished one.
  """
  if (folder / index).exists() or (folder / f"{index}{UNFINISHED}").exists():
    return
  for name in names:
    if os.path.lexists(folder / name):
      raise ValueError(
        f"{flag} {folder} has {name} but no {index}: it is not from this command; choose another folder, or remove it"
      )
