"""Images as data URIs, so that a page is one file."""

import dataclasses
from pathlib import Path

from PIL import Image

from uae_jax.files import data_uri

# Images up to this size are pixel art of the small world: kept as they are and enlarged without smoothing.
SMALL_PX = 96
LARGEST_PX = 384


@dataclasses.dataclass(frozen=True)
class Embedded:
  uri: str
  is_small: bool


def embed(image: Image.Image, largest_px: int = LARGEST_PX) -> Embedded:
  """A data URI of the image, photographs reduced to `largest_px`."""
  is_small = max(image.size) <= SMALL_PX
  image = image.convert("RGB")
  if is_small:
    return Embedded(data_uri(image, "PNG", optimize=True), is_small)
  image.thumbnail((largest_px, largest_px))
  return Embedded(data_uri(image, "JPEG", quality=88), is_small)


def embed_file(folder: Path, name) -> Embedded | None:
  """The image `name` of this folder; None if it is missing, unreadable or outside the folder."""
  if not isinstance(name, str) or not name:
    return None
  file = (folder / name).resolve()
  if not file.is_relative_to(folder.resolve()):
    return None
  try:
    with Image.open(file) as image:
      image.load()
      return embed(image)
  except Exception:  # PIL's decoders raise many kinds; the page shows an empty frame for all of them.
    return None
