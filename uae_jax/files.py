"""Helpers for small files: atomic writes, reading lines, and images as bytes or text."""

import base64
import io
import os
from pathlib import Path
import threading
from typing import Any

# Suffixes of the files that count as images in a folder.
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
  """Writes a file atomically: it has either the old or the new content, even after a crash. Text is UTF-8.

  Anything that is not a regular file, such as /dev/stdout or a pipe, is written directly.
  """
  content = content.encode() if isinstance(content, str) else content
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


def read_lines(path: str | os.PathLike) -> list[str]:
  r"""Reads the lines of a UTF-8 text or JSON lines file, with or without a byte order mark.

  Only \n and \r\n end a line: U+2028, U+0085 and others that `str.splitlines` splits at may occur in JSON strings.

  Raises:
    ValueError: the file is not UTF-8; the message names it.
  """
  try:
    text = Path(path).read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); expected a text file in UTF-8") from error
  lines = [line.removesuffix("\r") for line in text.split("\n")]
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
