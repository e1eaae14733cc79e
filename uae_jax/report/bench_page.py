"""The page of `uae-jax bench`: scores, and the best and worst pairs side by side."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from pathlib import Path

from PIL import Image

from uae_jax.files import shown, write_whole
from uae_jax.report.inline_images import embed
from uae_jax.report.templates import environment


@dataclasses.dataclass(frozen=True)
class ScoredPair:
  """An original and its reconstruction, with one similarity per embedder and their mean."""

  reference: Path
  image: Path
  similarities: Mapping[str, float]
  mean: float


def write_page(
  file: Path,
  averages: Mapping[str, float | None],
  groups: Mapping[str, Sequence[ScoredPair]],
  notes: Sequence[str],
  read: Callable[[Path], Image.Image],
) -> None:
  """Writes one self-contained page.

  Args:
    file: path of the page.
    averages: embedder -> mean cosine similarity, None if no pair was scored; last "unified", their mean.
    groups: section heading -> pairs.
    notes: messages about missing, unreadable and ambiguous images.
    read: reads the pixels that were scored.
  """
  sections = {
    heading: [
      {
        "name": shown(pair.reference.name),
        "reconstruction": shown(pair.image.name),
        "original": embed(read(pair.reference)),
        "generated": embed(read(pair.image)),
        "similarities": {name: f"{100 * value:.2f}" for name, value in pair.similarities.items()},
        "mean": f"{100 * pair.mean:.2f}",
      }
      for pair in pairs
    ]
    for heading, pairs in groups.items()
  }
  scores = {name: "-" if value is None else f"{100 * value:.2f}" for name, value in averages.items()}
  html = (
    environment()
    .get_template("bench.html")
    .render(scores=scores, sections=sections, notes=[shown(note) for note in notes])
  )
  write_whole(file, html)
