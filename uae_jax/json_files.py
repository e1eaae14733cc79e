"""Reading JSON files of others: strict, and within bounded memory."""

from collections.abc import Mapping
import json
from pathlib import Path
from typing import Any

# The largest file of this kind in use, the tokenizer.json of a large vocabulary, has 33 MB.
MAX_BYTES = 128 * 2**20
GIT_LFS = b"version https://git-lfs"


class Pointer(ValueError):
  """Raised for a file that git-lfs has not downloaded."""

  def __init__(self, path: Path):
    super().__init__(f"{path}: a pointer of git-lfs, not the file itself: run `git lfs pull` in its repository")


def read_object(path: str | Path, *, default: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """Reads a JSON file that holds one object.

  Args:
    path: the file.
    default: returned if there is no such file; None raises.

  Raises:
    ValueError: the file is missing, too large, no JSON object, or gives one name twice; the message names it.
  """
  path = Path(path)
  if default is not None and not path.exists():
    return dict(default)
  try:
    with open(path, "rb") as stream:
      content = stream.read(MAX_BYTES + 1)
  except FileNotFoundError as error:
    raise ValueError(f"{path}: no such file") from error
  except OSError as error:
    raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
  if content.startswith(GIT_LFS):
    raise Pointer(path)
  return parse_object(content, str(path))


def parse_object(content: bytes, where: str) -> dict[str, Any]:
  """Parses JSON text that holds one object.

  Args:
    content: UTF-8, with or without a byte order mark.
    where: the name of the text in error messages.

  Raises:
    ValueError: the text is too long, not JSON, no object, gives one name twice, or contains NaN or Infinity.
  """
  if len(content) > MAX_BYTES:
    raise ValueError(f"{where}: more than {MAX_BYTES >> 20} MiB of JSON")
  try:
    value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_no_constant)
  except RecursionError as error:
    raise ValueError(f"{where}: not JSON (nested too deeply)") from error
  except ValueError as error:
    raise ValueError(f"{where}: not JSON ({error})") from error
  if not isinstance(value, dict):
    raise ValueError(f"{where}: JSON of a {type(value).__name__}, expected an object")
  return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  value: dict[str, Any] = {}
  for name, item in pairs:
    if name in value:
      raise ValueError(f"the name {name!r} occurs twice in one object")
    value[name] = item
  return value


def _no_constant(name: str) -> None:
  raise ValueError(f"{name} is no number of JSON")
