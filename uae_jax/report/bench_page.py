"""The page of `uae-jax bench`: scores, and the best and worst pairs side by side."""

from collections.abc import Mapping, Sequence
import dataclasses
from pathlib import Path

from uae_jax.data.preprocessing import read_image
from uae_jax.files import write_whole
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
  overall: float | None,
  groups: Mapping[str, Sequence[ScoredPair]],
  notes: Sequence[str],
) -> None:
  """Writes one self-contained page.

  Args:
    file: path of the page.
    averages: embedder -> mean cosine similarity, None if no pair was scored.
    overall: mean of `averages`.
    groups: section heading -> pairs.
    notes: messages about missing and unreadable images.
  """
  sections = {
    heading: [
      {
        "name": pair.reference.name,
        "reconstruction": pair.image.name,
        "original": embed(read_image(pair.reference)),
        "generated": embed(read_image(pair.image)),
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
    .render(
      scores=scores, overall="-" if overall is None else f"{100 * overall:.2f}", sections=sections, notes=list(notes)
    )
  )
  write_whole(file, html)
