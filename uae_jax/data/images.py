"""Reads images of every kind that users have as upright 8-bit RGB.

Transparency becomes white. Deep and floating-point pixels keep their range; values whose range is unclear are refused.
Of an animation or a file with several pages, the first one is read. Color profiles are ignored, as by the image
processors of transformers.
"""

import functools
import io
import os
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from uae_jax.files import require_regular
from uae_jax.json_files import GIT_LFS

ImageSource = Image.Image | str | os.PathLike | np.ndarray

# What the largest value of an image means, if its dtype does not say so.
FLOAT_WHITES, INTEGER_WHITES = (1, 255, 65535), (255, 65535)
# PIL reads these formats as 32-bit integers, scaled to 16 bits.
SCALED_TO_16_BITS = ("PNG", "PPM")
# How much of a file is looked at to say what it is instead of an image.
START_BYTES = 512
POSTSCRIPT = (b"%!PS", b"\xc5\xd0\xd3\xc6")


@functools.cache
def _formats() -> tuple[str, ...]:
  """PIL's formats, in its order, without PostScript: PIL gives such files to Ghostscript, which runs them."""
  Image.init()
  return tuple(name for name in Image.ID if name != "EPS")


def open_image(content: str | os.PathLike | BinaryIO) -> Image.Image:
  """Opens an image whose content may be anyone's; raises what PIL raises."""
  return Image.open(content, formats=_formats())


def read_image(source: ImageSource) -> Image.Image:
  """Reads any image as upright RGB.

  Args:
    source: a path, a PIL image of any mode, or uint8[H, W], [H, W, C] with 1 to 4 channels.

  Raises:
    ValueError: the file is missing, corrupt, not an image or not a regular file (the message names it), the array has
      another dtype or shape, or the source is of another type.
  """
  if isinstance(source, np.ndarray):
    if source.dtype != np.uint8:
      raise ValueError(f"image array of {source.dtype}{list(source.shape)}, expected uint8[H, W] or [H, W, channels]")
    return from_array(source)
  if isinstance(source, Image.Image):
    return to_rgb(source)
  if not isinstance(source, str | os.PathLike):
    raise ValueError(f"an image is of type {type(source).__name__}, expected a path, a PIL image or an array")
  try:
    require_regular(source)
    with open_image(source) as image:
      return to_rgb(image)
  except FileNotFoundError as error:
    raise ValueError(f"cannot read image {os.fspath(source)}: no such file") from error
  except Exception as error:  # PIL's decoders raise a dozen exception types for corrupt files.
    start = _start(source) if isinstance(error, UnidentifiedImageError) else b""
    raise ValueError(f"cannot read image {os.fspath(source)}: {why_unreadable(start, error)}") from error


def image_from_bytes(data: bytes, name: str) -> Image.Image:
  """Reads the content of an image file as upright RGB.

  Args:
    data: content of the file.
    name: what it is, for messages.

  Raises:
    ValueError: the content is not that of an image; the message has the name.
  """
  try:
    with open_image(io.BytesIO(data)) as image:
      return to_rgb(image)
  except Exception as error:  # PIL's decoders raise a dozen exception types for corrupt files.
    raise ValueError(f"cannot read {name}: {why_unreadable(data[:START_BYTES], error)}") from error


def from_array(pixels: np.ndarray) -> Image.Image:
  """Converts an array to RGB.

  Args:
    pixels: [H, W] or [H, W, C] of any dtype; gray, gray and alpha, RGB, or RGB and alpha. Floats are in 0..1, 0..255 or
      0..65535.

  Raises:
    ValueError: the shape is not that of an image, or the range of the values is unclear.
  """
  pixels = np.asarray(pixels)
  channels = 1 if pixels.ndim == 2 else pixels.shape[-1] if pixels.ndim == 3 else 0
  if channels not in (1, 2, 3, 4) or 0 in pixels.shape:
    raise ValueError(f"image array of {pixels.dtype}{list(pixels.shape)}, expected [H, W] or [H, W, 1 to 4 channels]")
  values = np.ascontiguousarray(to_8_bits(pixels))
  return to_rgb(Image.fromarray(values[..., 0] if values.ndim == 3 and channels == 1 else values))


def to_rgb(image: Image.Image) -> Image.Image:
  """Converts a PIL image of any mode to upright RGB.

  Raises:
    ValueError: the range of deep or floating-point values is unclear.
  """
  is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in SCALED_TO_16_BITS)
  image = ImageOps.exif_transpose(image)  # Forgets the format.
  if image.mode.startswith(("I", "F")):
    image = _from_deep_gray(image, is_16_bit)
  if "a" in image.getbands():  # Premultiplied alpha.
    image = image.convert(image.mode.replace("a", "A"))
  if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
  return image.convert("RGB")


def to_8_bits(values: np.ndarray) -> np.ndarray:
  """Scales pixels of any dtype to uint8.

  Booleans become black and white, and 16-bit values are divided by 257. For other dtypes the smallest usual white that
  is not exceeded (1, 255 or 65535; not 1 for integers) becomes 255.

  Raises:
    ValueError: a value is not finite or outside of 0..65535, or the brightest one is less than a sixteenth of white,
      so that the image would be nearly black.
  """
  if values.dtype == np.uint8:
    return values
  if values.dtype == np.bool_:
    return values * np.uint8(255)
  if values.dtype.kind == "u" and values.dtype.itemsize == 2:
    return (values // 257).astype(np.uint8)
  whites = FLOAT_WHITES if values.dtype.kind == "f" else INTEGER_WHITES
  low, high = values.min(), values.max()
  # Filters that resize or sharpen leave values slightly outside of the range.
  white = next((white for white in whites if high <= 1.05 * white), None)
  if white is None or not low >= -0.05 * white or (white > whites[0] and high < white / 16):
    expected = " or ".join(f"0..{white}" for white in whites)
    raise ValueError(f"pixels of {values.dtype} from {low:g} to {high:g}: expected values that fill {expected}")
  return np.rint(np.clip(values.astype(np.float64) * (255 / white), 0, 255)).astype(np.uint8)


def why_unreadable(start: bytes, error: Exception) -> str:
  """Says why what begins with `start` is no image, given what PIL raised.

  What downloads leave in place of an image is recognized.
  """
  if isinstance(error, UnidentifiedImageError):
    if not start:
      return "an empty file"
    if start.startswith(GIT_LFS):
      return "a pointer of git-lfs, not the image itself: run `git lfs pull` in its repository"
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
      return "a web page, not an image"
    if start.startswith(POSTSCRIPT):
      return "PostScript, which is a program and is not run: convert it to PNG"
    # PIL names an object in memory instead.
    return f"{type(error).__name__}: cannot identify what begins with {start[:8]!r}"
  return f"{type(error).__name__}: {error}"


def _start(path: str | os.PathLike) -> bytes:
  with open(path, "rb") as file:
    return file.read(START_BYTES)


def _from_deep_gray(image: Image.Image, is_16_bit: bool) -> Image.Image:
  """Converts 16-bit, 32-bit or floating-point gray to 8 bits; a transparent gray level becomes transparency."""
  values = np.asarray(image)
  gray = Image.fromarray(to_8_bits(values.astype(np.uint16) if is_16_bit else values))
  if isinstance(image.info.get("transparency"), int):
    gray.putalpha(Image.fromarray((values != image.info["transparency"]) * np.uint8(255)))
  return gray
