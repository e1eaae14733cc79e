"""What a result of Unified-Bench needs said beside its numbers: missing files, ambiguous names, unusual pixels."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from uae_jax.data import official_pixels
from uae_jax.evaluation import unified_bench
from uae_jax.evaluation.unified_bench import Pairs


def missing(pairs: Pairs, references: Sequence[Path], not_counted: Sequence[Path]) -> list[str]:
  """Says which reconstructions have no original and which originals no reconstruction.

  Args:
    pairs: result of `unified_bench.pair`.
    references: originals that could be paired.
    not_counted: further originals, whose suffix the official script does not read.
  """
  alone = [image for image, reference in pairs.items() if reference is None]
  used = set(pairs.values())
  return [
    f"{image.name}: no original" + (f"; {reference.name} counts with --suffixes all" if reference else "")
    for image, reference in unified_bench.pair(alone, not_counted).items()
  ] + [f"{reference.name}: no reconstruction" for reference in references if reference not in used]


def ambiguous(pairs: Pairs) -> list[str]:
  """Says where the official script has other pairs or fewer numbers."""
  counts = Counter(image.name for image in pairs)
  return [
    f"{name}: {count} files of this name; the official result has the last one only"
    for name, count in counts.items()
    if count > 1
  ] + [
    f"{image.name}: is of {reference.name}, for which the official script has no rule"
    for image, reference in pairs.items()
    if reference and not unified_bench.is_official(image, reference)
  ]


def affected(pairs: Pairs) -> dict[Path, str]:
  """Reconstruction -> why official and displayed pixels of its pair differ; pairs without a difference are left out."""
  found = {image: _difference((reference, image)) for image, reference in pairs.items() if reference}
  return {image: cause for image, cause in found.items() if cause}


def _difference(files: Iterable[Path]) -> str:
  try:
    causes = {file.name: official_pixels.difference(file) for file in files}
  except Exception:  # Not readable: reported where the similarity is computed.
    return ""
  return ", ".join(f"{cause} of {name}" for name, cause in causes.items() if cause)


def both_readings(
  causes: Mapping[Path, str],
  official: Mapping[str, Mapping[Path, float | None]],
  displayed: Mapping[str, Mapping[Path, float | None]],
) -> list[str]:
  """Says how much the pixels change the similarities of each pair that `affected` found.

  Args:
    causes: result of `affected`.
    official: embedder -> reconstruction -> similarity of the official pixels.
    displayed: the same of the displayed pixels.
  """

  def figures(image: Path) -> str:
    return "; ".join(
      f"{kind} official {_figure(official[kind][image])}, displayed {_figure(displayed[kind][image])}"
      for kind in official
    )

  return [f"{image.name}: {cause}: {figures(image)}" for image, cause in causes.items()]


def _figure(value: float | None) -> str:
  return "-" if value is None else f"{value:.4f}"
