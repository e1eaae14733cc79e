"""One rule for the records of every source: which field holds image and caption, and what is refused.

A refused record raises; the pipeline counts it, names it and skips it (`bad_records.BadRecords`).
"""

import base64
from collections.abc import Mapping
import dataclasses
import json
from pathlib import Path, PureWindowsPath
import re
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np

from uae_jax import cloud_storage
from uae_jax.data.images import image_from_bytes, read_image
from uae_jax.files import is_in_cloud
from uae_jax.options.data import FIRST, LONGEST, RANDOM

# Names of a field, in order of preference.
CAPTION_FIELDS = ("caption", "captions", "text", "prompt")
IMAGE_FIELDS = ("image", "file_name", "image_path")
# What a record of `pack` begins with; then 4 bytes with the length of a JSON object, the object, and the image file.
MAGIC = b"\x00uae1"


@dataclasses.dataclass(frozen=True)
class Fields:
  """Where a record holds its image and its captions.

  Attributes:
    image: name of the field of the image; "" takes the first of `image_base64` and `IMAGE_FIELDS` that a record has.
    caption: name of the field of the captions; "" takes the first of `CAPTION_FIELDS` that a record has.
    choice: which of several captions is used: "first", "longest" or "random".
  """

  image: str = ""
  caption: str = ""
  choice: str = FIRST


DEFAULT_FIELDS = Fields()


def read(record: Mapping[str, Any], folder: Path, fields: Fields = DEFAULT_FIELDS) -> dict[str, Any]:
  """Reads what the pipeline needs of a record; the captions first, which are cheaper.

  Returns:
    `image` uint8[H, W, 3], `caption`, and for the choice "random" all `captions`, of which the pipeline draws one.
  """
  captions = captions_of(record, fields)
  return {"image": image_of(record, folder, fields), **chosen(captions, fields)}


def chosen(captions: tuple[str, ...], fields: Fields) -> dict[str, Any]:
  """The fields `caption` and, for the choice "random", `captions` of a record with these captions."""
  caption = max(captions, key=len, default="") if fields.choice == LONGEST else next(iter(captions), "")
  return {"caption": caption} | ({"captions": captions} if fields.choice == RANDOM else {})


def pack(fields: Mapping[str, Any], image: bytes) -> bytes:
  """Packs a record with the content of an image file, which in JSON would need base64; `parse` reads it as `image`."""
  header = json.dumps(fields).encode()
  return MAGIC + len(header).to_bytes(4, "little") + header + image


def parse(line: bytes) -> dict[str, Any]:
  """Parses a JSON object, or a record of `pack`.

  Raises:
    ValueError: this is no JSON, another kind of value, or an object with a field twice.
  """
  if line.startswith(MAGIC):
    start = len(MAGIC) + 4
    end = start + int.from_bytes(line[len(MAGIC) : start], "little")
    return {**parse(line[start:end]), "image": line[end:]}
  record = json.loads(line, object_pairs_hook=_distinct)
  if not isinstance(record, dict):
    raise ValueError(f"expected a JSON object, found {type(record).__name__} {_short(record)}")
  return record


def caption_of(record: Mapping[str, Any], fields: Fields = DEFAULT_FIELDS) -> str:
  """Returns the caption of a record; of several the longest if `fields` say so, else the first; "" for none.

  Raises:
    ValueError: see `captions_of`.
  """
  return chosen(captions_of(record, fields), fields)["caption"]


def captions_of(record: Mapping[str, Any], fields: Fields = DEFAULT_FIELDS) -> tuple[str, ...]:
  """Returns the captions of a record that are not blank; empty if it has none. "first" looks at no other one.

  Raises:
    ValueError: a caption is not text, cannot be encoded as UTF-8, or the field that `fields` name is missing.
  """
  field = _field(record, fields.caption, CAPTION_FIELDS)
  if field is None:
    return ()
  value = record[field]
  values = value if isinstance(value, list) and value else [value]
  if fields.choice == FIRST:
    values = values[:1]
  if not all(isinstance(text, str) for text in values):
    raise ValueError(f"{field} = {_short(value)}: expected text, or no such field if there is no caption")
  return tuple(encodable(text, field) for text in values if text.strip())


def _field(record: Mapping[str, Any], name: str, names: tuple[str, ...]) -> str | None:
  """The field `name`, or if that is "" the first of `names` that a record has."""
  if name and name not in record:
    raise ValueError(f"no field {name}; the record has {', '.join(list(record)[:8]) or 'none'}")
  return name or next((name for name in names if name in record), None)


def encodable(text: str, field: str) -> str:
  r"""Returns a text unchanged if it is valid Unicode; JSON may contain half a surrogate pair, such as "\ud800"."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(f"{field} contains {text[error.start]!a} at character {error.start}, which is not text") from error
  return text


def image_of(record: Mapping[str, Any], folder: Path, fields: Fields = DEFAULT_FIELDS) -> np.ndarray:
  """Reads the image of a record as uint8[H, W, 3]; arguments and errors as for `image_content`."""
  content, name = image_content(record, folder, fields)
  return np.asarray(image_from_bytes(content, name) if isinstance(content, bytes) else read_image(content))


def image_content(record: Mapping[str, Any], folder: Path, fields: Fields = DEFAULT_FIELDS) -> tuple[bytes | Path, str]:
  """Finds the image of a record without decoding it.

  Args:
    record: has `image_base64`, or a field with a path, a data URI, the bytes of a file, or as in Hugging Face datasets
      `{"bytes": ..., "path": ...}` with one of the two.
    folder: folder that paths are relative to.
    fields: name of the field.

  Returns:
    (content of the image file, or its path; what it is, for messages).

  Raises:
    ValueError: no field names one image.
  """
  field = _field(record, fields.image, ("image_base64", *IMAGE_FIELDS))
  if field is None:
    found = ", ".join(list(record)[:8]) or "none"
    raise ValueError(f"no field image_base64, {', '.join(IMAGE_FIELDS)}; the record has {found}")
  value = record[field]
  if isinstance(value, list) and len(value) == 1:
    value = value[0]
  if isinstance(value, Mapping):
    data, path = value.get("bytes"), value.get("path")
    if isinstance(data, bytes) or (data is None and isinstance(path, str)):
      value = path if data is None else data
  if isinstance(value, bytes):
    return value, f"the image in {field}"
  if not isinstance(value, str) or not value:
    raise ValueError(f"{field} = {_short(value)}: expected one image as text")
  if field == "image_base64" or value.startswith("data:"):
    return _from_base64(value, field), f"the image in {field}"
  return locate(folder, value), "the image"


def locate(folder: Path, name: str) -> Path:
  r"""Finds the file that a record names: relative or absolute, with `\` from Windows, percent-encoded, or a file URI.

  What is in a bucket, or named by a record from one, is copied to this machine the first time.

  Raises:
    ValueError: the name is the address of something elsewhere, or the bucket cannot be read.
  """
  if is_in_cloud(name):
    copy = Path(cloud_storage.copy_of(name))
    cloud_storage.fetch_missing(copy)
    return copy
  scheme = re.match(r"([A-Za-z][\w+.-]+)://", name)
  if scheme and scheme[1].lower() != "file":
    raise ValueError(f"image {_short(name)} is not on this disk: download it and write its path")
  path = folder / name
  if scheme:
    return Path(unquote(urlsplit(name).path))
  names = (name, unquote(name), PureWindowsPath(name).as_posix())
  places = [folder / other for other in names]
  found = next(filter(Path.exists, places), None)
  return found or next(filter(cloud_storage.fetch_missing, dict.fromkeys(places)), path)


def _from_base64(text: str, field: str) -> bytes:
  if text.startswith("data:"):
    text = text.partition(",")[2]
  try:
    # Encoders for mail break lines.
    return base64.b64decode("".join(text.split()), validate=True)
  except ValueError as error:
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
