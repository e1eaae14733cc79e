"""The page of `uae-jax reconstruct`: originals and reconstructions side by side."""

from collections.abc import Sequence
import dataclasses
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from uae_jax.files import write_whole
from uae_jax.report.inline_images import SMALL_PX, embed
from uae_jax.report.templates import environment


@dataclasses.dataclass(frozen=True)
class Pair:
  """One image: `path` as given by the user, and `reconstruction`, a file name in the folder of the page."""

  path: str
  original: Image.Image
  caption: str
  reconstruction: str
  reconstruction_px: int


def write_page(folder: Path, pairs: Sequence[Pair], failed: Sequence[str], notice: str) -> Path:
  """Writes index.html with embedded (reduced) originals and linked reconstructions; returns its path."""
  rows = [
    {
      "path": pair.path,
      "original": embed(pair.original),
      "caption": pair.caption,
      "reconstruction": quote(pair.reconstruction),
      "is_small": pair.reconstruction_px <= SMALL_PX,
    }
    for pair in pairs
  ]
  file = folder / "index.html"
  html = environment().get_template("reconstructions.html").render(rows=rows, failed=list(failed), notice=notice)
  write_whole(file, html)
  return file
