"""Small files: written whole or not at all, read line by line, and images as text."""

import base64
import io
import os
from pathlib import Path
import threading
from typing import Any

# What a folder of images is searched for.
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
  """Writes a file that is the old one or the new one at every moment, also after a crash; text as UTF-8.

  Anything that is not a regular file, such as /dev/stdout or a pipe, is written directly.
  """
  content = content.encode() if isinstance(content, str) else content
  if os.path.exists(path) and not os.path.isfile(path):
    with open(path, "wb") as stream:
      stream.write(content)
    return
  # A link stays a link. The temporary name is short: one made of a long file name could be too long.
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
  r"""The lines of a UTF-8 text or JSON lines file, with or without a byte order mark.

  Only \n and \r\n end a line: U+2028, U+0085 and others that `str.splitlines` splits at may stand inside JSON strings.

  Raises:
    ValueError: names the file that is not UTF-8.
  """
  try:
    text = Path(path).read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); expected a text file in UTF-8") from error
  lines = [line.removesuffix("\r") for line in text.split("\n")]
  return lines if lines[-1] else lines[:-1]


def image_bytes(image: Any, kind: str = "PNG", **options: Any) -> bytes:
  """An encoded image.

  Args:
    image: PIL image, or uint8[H, W, 3].
    kind: "PNG" or "JPEG".
    options: of PIL's writer, such as quality.
  """
  from PIL import Image

  if not isinstance(image, Image.Image):
    image = Image.fromarray(image)
  data = io.BytesIO()
  image.save(data, kind, **options)
  return data.getvalue()


def png_base64(image: Any) -> str:
  """A PIL image or uint8[H, W, 3] as base64 of a PNG."""
  return base64.b64encode(image_bytes(image)).decode()


def data_uri(image: Any, kind: str = "PNG", **options: Any) -> str:
  """An image as data URI; arguments as of `image_bytes`."""
  return f"data:image/{kind.lower()};base64,{base64.b64encode(image_bytes(image, kind, **options)).decode()}"
