"""PNG files as data URIs, so that a page is one file."""

import base64
import dataclasses
import io
from pathlib import Path

from PIL import Image

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
  data = io.BytesIO()
  if is_small:
    image.save(data, "PNG", optimize=True)
  else:
    image.thumbnail((largest_px, largest_px))
    image.save(data, "JPEG", quality=88)
  kind = "png" if is_small else "jpeg"
  return Embedded(f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}", is_small)


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
  except (
    Exception
  ):  # PIL's decoders raise many kinds for a damaged file; the page shows an empty frame for all of them.
    return None
