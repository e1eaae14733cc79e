"""Encodes images as data URIs, so that a page is a single file."""

import dataclasses
from pathlib import Path

from PIL import Image

from uae_jax.data.images import open_image
from uae_jax.files import data_uri

# Images up to this size come from the small world: stored losslessly and enlarged without smoothing.
SMALL_PX = 96
LARGEST_PX = 384


@dataclasses.dataclass(frozen=True)
class Embedded:
  uri: str
  is_small: bool


def embed(image: Image.Image, largest_px: int = LARGEST_PX) -> Embedded:
  """Encodes an image as a data URI; images larger than SMALL_PX are reduced to `largest_px`."""
  is_small = max(image.size) <= SMALL_PX
  image = image.convert("RGB")
  if is_small:
    return Embedded(data_uri(image, "PNG", optimize=True), is_small)
  image.thumbnail((largest_px, largest_px))
  return Embedded(data_uri(image, "JPEG", quality=88), is_small)


def embed_file(folder: Path, name) -> Embedded | None:
  """Encodes the image `name` of a folder; None if it is missing, unreadable or outside the folder."""
  if not isinstance(name, str) or not name:
    return None
  file = (folder / name).resolve()
  if not file.is_relative_to(folder.resolve()):
    return None
  try:
    with open_image(file) as image:
      image.load()
      return embed(image)
  except Exception:  # PIL's decoders raise many exception types; the page shows an empty frame for any of them.
    return None
