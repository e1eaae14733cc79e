"""Pixels as the official scripts read them.

`read_image` gives what a viewer displays: upright by EXIF, transparency on white, 16-bit gray scaled to 8 bits. The
official scripts do not, so figures that are compared with published ones need their pixels.

Source: `convert("RGB")` in the Unified-Bench script of PKU-YuanGroup/UAE; `to_rgb` of qwen-vl-utils 0.0.14, which its
demo uses.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from uae_jax.data.images import open_image, read_image

EXIF_ORIENTATION = 0x0112


def benchmark_rgb(file: Path) -> Image.Image:
  """Reads an image as Unified-Bench does: transparency and EXIF are ignored, 16-bit gray is clipped at 255.

  Raises:
    ValueError: the file cannot be read; the message names it.
  """
  return _read(file, lambda image: image.convert("RGB"))


def demo_rgb(file: Path) -> Image.Image:
  """Reads an image as the captioning demo does: as in the benchmark, but RGBA is put on white.

  Raises:
    ValueError: the file cannot be read; the message names it.
  """

  def convert(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
      return image.convert("RGB")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white

  return _read(file, convert)


def _read(file: Path, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
  try:
    with open_image(file) as image:
      # A new image has no EXIF and no transparent color, which would be applied later.
      return Image.fromarray(np.asarray(convert(image)))
  except Exception as error:  # PIL's decoders raise a dozen exception types for corrupt files.
    raise ValueError(f"cannot read image {file}: {type(error).__name__}: {error}") from error


def difference(file: Path) -> str:
  """Says what makes the displayed pixels of a file differ from those of the benchmark; "" if they are the same."""
  with open_image(file) as image:
    causes = {
      "EXIF rotation": image.getexif().get(EXIF_ORIENTATION, 1) != 1,
      "transparency": "A" in image.getbands() or "transparency" in image.info,
      f"{image.mode} pixels": image.mode.startswith(("I", "F")),
    }
  found = ", ".join(cause for cause, applies in causes.items() if applies)
  if not found or np.array_equal(np.asarray(benchmark_rgb(file)), np.asarray(read_image(file))):
    return ""
  return found
