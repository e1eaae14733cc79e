"""The page of `uae-jax bench`: the scores, and the best and the worst pairs side by side."""

from collections.abc import Mapping, Sequence
import dataclasses
from pathlib import Path

from uae_jax.data.preprocessing import read_image
from uae_jax.files import write_whole
from uae_jax.report.inline_images import embed
from uae_jax.report.templates import environment


@dataclasses.dataclass(frozen=True)
class ScoredPair:
  """One original and its reconstruction, with one similarity per embedder and their mean."""

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
    file: to write.
    averages: embedder -> mean similarity.
    overall: their mean.
    groups: heading -> pairs.
    notes: what is missing or unreadable.
  """
  sections = {
    heading: [
      {
        "name": pair.reference.name,
        "reconstruction": pair.image.name,
        "original": embed(read_image(pair.reference)),
        "painted": embed(read_image(pair.image)),
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
