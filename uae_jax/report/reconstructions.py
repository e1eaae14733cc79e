"""The page of `uae-jax reconstruct`: originals and reconstructions side by side."""

from collections.abc import Sequence
import dataclasses
import os
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from uae_jax.files import shown, write_whole
from uae_jax.report.inline_images import SMALL_PX, Embedded, embed
from uae_jax.report.templates import environment


@dataclasses.dataclass(frozen=True)
class Pair:
  """An image and its reconstruction, without their pixels at full size: there may be many pairs.

  Attributes:
    path: the image as given by the user.
    original: the image, reduced.
    caption: the caption between the two.
    reconstruction: name of a file in the folder of the page.
    is_small: whether the reconstruction is enlarged without smoothing.
  """

  path: str
  original: Embedded
  caption: str
  reconstruction: str
  is_small: bool

  @classmethod
  def of(cls, path: Path, original: Image.Image, caption: str, reconstruction: str, image: Image.Image) -> "Pair":
    return cls(shown(path), embed(original), caption, reconstruction, image.width <= SMALL_PX)


def write_page(folder: Path, pairs: Sequence[Pair], failed: Sequence[str], notice: str) -> Path:
  """Writes index.html with embedded (reduced) originals and linked reconstructions; returns its path."""
  rows = [
    {
      "path": pair.path,
      "original": pair.original,
      "caption": pair.caption,
      "reconstruction": quote(os.fsencode(pair.reconstruction)),
      "is_small": pair.is_small,
    }
    for pair in pairs
  ]
  file = folder / "index.html"
  html = environment().get_template("reconstructions.html").render(rows=rows, failed=list(failed), notice=notice)
  write_whole(file, html)
  return file
