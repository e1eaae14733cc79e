"""One rule for the records of every source: which field holds image and caption, and what is refused.

A refused record raises; the pipeline counts it, names it and skips it (`bad_records.BadRecords`).
"""

import base64
from collections.abc import Mapping
import io
import json
from pathlib import Path, PureWindowsPath
import re
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np

from uae_jax.data.images import read_image, to_rgb

# Names of a field, in order of preference.
CAPTION_FIELDS = ("caption", "captions", "text", "prompt")
IMAGE_FIELDS = ("image", "file_name", "image_path")


def parse(line: bytes) -> dict[str, Any]:
  """Parses a JSON object.

  Raises:
    ValueError: this is no JSON, another kind of value, or an object with a field twice.
  """
  record = json.loads(line, object_pairs_hook=_distinct)
  if not isinstance(record, dict):
    raise ValueError(f"expected a JSON object, found {type(record).__name__} {_short(record)}")
  return record


def caption_of(record: Mapping[str, Any]) -> str:
  """Returns the caption of a record, of a list the first one; "" if no field of `CAPTION_FIELDS` exists or it is blank.

  Raises:
    ValueError: the caption is not text, or cannot be encoded as UTF-8.
  """
  field = next((name for name in CAPTION_FIELDS if name in record), None)
  if field is None:
    return ""
  value = record[field]
  if isinstance(value, list) and value:
    value = value[0]
  if not isinstance(value, str):
    raise ValueError(f"{field} = {_short(record[field])}: expected text, or no such field if there is no caption")
  return encodable(value, field) if value.strip() else ""


def encodable(text: str, field: str) -> str:
  r"""Returns a text unchanged if it is valid Unicode; JSON may contain half a surrogate pair, such as "\ud800"."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(f"{field} contains {text[error.start]!a} at character {error.start}, which is not text") from error
  return text


def image_of(record: Mapping[str, Any], folder: Path) -> np.ndarray:
  """Reads the image of a JSON record as uint8[H, W, 3].

  Args:
    record: has `image_base64`, or one of `IMAGE_FIELDS` with a path or a data URI.
    folder: folder that paths are relative to.

  Raises:
    ValueError: no field names one image, or the image cannot be read.
  """
  field = next((name for name in ("image_base64", *IMAGE_FIELDS) if name in record), None)
  if field is None:
    found = ", ".join(list(record)[:8]) or "none"
    raise ValueError(f"no field image_base64, {', '.join(IMAGE_FIELDS)}; the record has {found}")
  value = record[field]
  if isinstance(value, list) and len(value) == 1:
    value = value[0]
  if not isinstance(value, str) or not value:
    raise ValueError(f"{field} = {_short(value)}: expected one image as text")
  if field == "image_base64" or value.startswith("data:"):
    return _from_base64(value, field)
  return np.asarray(read_image(locate(folder, value)))


def locate(folder: Path, name: str) -> Path:
  r"""Finds the file that a record names: relative or absolute, with `\` from Windows, percent-encoded, or a file URI.

  Raises:
    ValueError: the name is the address of something elsewhere.
  """
  scheme = re.match(r"([A-Za-z][\w+.-]+)://", name)
  if scheme and scheme[1].lower() != "file":
    raise ValueError(f"image {_short(name)} is not on this disk: download it and write its path")
  path = folder / name
  if scheme:
    return Path(unquote(urlsplit(name).path))
  others = (unquote(name), PureWindowsPath(name).as_posix())
  return next((folder / other for other in (name, *others) if (folder / other).exists()), path)


def _from_base64(text: str, field: str) -> np.ndarray:
  from PIL import Image

  if text.startswith("data:"):
    text = text.partition(",")[2]
  try:
    # Encoders for mail break lines.
    data = base64.b64decode("".join(text.split()), validate=True)
    with Image.open(io.BytesIO(data)) as image:
      return np.asarray(to_rgb(image))
  except Exception as error:  # PIL's decoders raise a dozen exception types for corrupt files.
    raise ValueError(f"cannot read the image in {field}: {type(error).__name__}: {error}") from error


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  fields = dict(pairs)
  if len(fields) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise ValueError(f"field {twice!r} occurs twice")
  return fields


def _short(value: Any) -> str:
  text = json.dumps(value, default=repr)
  return text if len(text) <= 60 else f"{text[:57]}..."
