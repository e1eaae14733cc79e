"""The page of `uae-jax data inspect`: what a source contains, and some of its images with their captions."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from uae_jax.data.statistics import Statistics
from uae_jax.files import shown, write_whole
from uae_jax.report.inline_images import embed
from uae_jax.report.templates import environment

THUMBNAIL_PX = 256


def write_page(file: Path, title: str, rows: Sequence[tuple[str, str]], statistics: Statistics) -> None:
  """Writes one self-contained page.

  Args:
    file: path of the page.
    title: name of the source.
    rows: (name, value) pairs of the table.
    statistics: has the sample images and the unreadable records.
  """
  samples = [
    {"key": shown(key), "image": embed(Image.fromarray(image), THUMBNAIL_PX), "caption": caption}
    for key, image, caption in statistics.shown
  ]
  template = environment().get_template("data.html")
  write_whole(
    file, template.render(title=shown(title), rows=rows, samples=samples, unreadable=statistics.unreadable[:50])
  )
