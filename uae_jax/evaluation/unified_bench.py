"""Unified-Bench, protocol 1: similarity of originals and their reconstructions under several image embedders.

Source: the scoring script of PKU-YuanGroup/UAE, whose result file is reproduced: which files count, pairing, pixels
(`data.official_pixels`), cosine similarity under each embedder's own preprocessing, and the fields.
"""

from collections.abc import Callable, Mapping, Sequence
import csv
import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from uae_jax.files import shown, write_whole

OFFICIAL_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tiff", ".webp"})
PREFIX = "recon_"
BATCH = 64

Pairs = Mapping[Path, Path | None]  # reconstruction -> its original
Embed = Callable[[Sequence[Any]], np.ndarray]
Read = Callable[[Path], Any]


@dataclasses.dataclass(frozen=True)
class Scores:
  """Similarities of every pair under every embedder.

  Attributes:
    pairs: reconstruction -> its original, or None.
    similarities: embedder -> reconstruction -> cosine similarity, None if a file is missing or unreadable.
  """

  pairs: Pairs
  similarities: Mapping[str, Mapping[Path, float | None]]

  @property
  def averages(self) -> dict[str, float | None]:
    """Mean similarity over valid pairs per embedder; None without a valid pair."""
    found = {kind: statistics(by_name(values)) for kind, values in self.similarities.items()}
    return {kind: entry["average_similarity"] if entry else None for kind, entry in found.items()}

  def mean(self, image: Path) -> float | None:
    """Returns the unified score of a reconstruction, the mean over the embedders; None if a similarity is missing."""
    values = [value for values in self.similarities.values() if (value := values[image]) is not None]
    return float(np.mean(values)) if len(values) == len(self.similarities) else None

  def ranked(self) -> dict[Path, float]:
    """Returns reconstruction -> unified score of those that have all similarities, best first."""
    scored = {image: mean for image in self.pairs if (mean := self.mean(image)) is not None}
    return dict(sorted(scored.items(), key=lambda pair: -pair[1]))


def image_files(folder: Path, *, suffixes: frozenset[str] = OFFICIAL_SUFFIXES) -> list[Path]:
  """Lists the images of a folder and its subfolders, sorted by path.

  Args:
    folder: the folder.
    suffixes: lower-case suffixes of the files that count; the official script has no .gif, .ppm and .tif.

  Raises:
    ValueError: the folder does not exist or contains no image.
  """
  if not folder.is_dir():
    raise ValueError(f"{folder}: no such folder")
  files = sorted((f for f in folder.rglob("*") if f.suffix.lower() in suffixes and f.is_file()), key=str)
  if not files:
    raise ValueError(f"{folder}: no image in it ({', '.join(sorted(suffixes))})")
  return files


def pair(images: Sequence[Path], references: Sequence[Path]) -> dict[Path, Path | None]:
  """Finds the original of each reconstruction.

  It has the same file name; else the same stem, or the stem after `recon_`, whichever is first among the references;
  else, which the official script does not know, the name after `recon_`: `recon_a.jpg.png` is of `a.jpg`, where there
  is also an `a.png`.
  """
  names: dict[str, Path] = {}
  stems: dict[str, tuple[int, Path]] = {}
  for number, reference in enumerate(references):
    names.setdefault(reference.name, reference)
    stems.setdefault(reference.stem, (number, reference))

  def original(image: Path) -> Path | None:
    if image.name in names:
      return names[image.name]
    bare = image.stem.removeprefix(PREFIX)
    found = [stems[stem] for stem in {image.stem, bare} if stem in stems]
    return min(found)[1] if found else names.get(bare if bare != image.stem else "")

  return {image: original(image) for image in images}


def is_official(image: Path, reference: Path) -> bool:
  """Whether the official script could pair the two."""
  return image.name == reference.name or image.stem in (reference.stem, PREFIX + reference.stem)


def similarities(kind: str, pairs: Pairs, embed: Embed, read: Read) -> tuple[dict[Path, float | None], dict[Path, str]]:
  """Computes the similarity of every pair under one embedder, with a progress bar.

  Args:
    kind: name of the embedder.
    pairs: result of `pair`.
    embed: images -> unit-norm embeddings float32[B, E].
    read: file -> image; raises `ValueError` that names the file.

  Returns:
    (reconstruction -> similarity, None where there is none; reconstruction -> why a pair has none).
  """
  values: dict[Path, float | None] = dict.fromkeys(pairs)
  problems: dict[Path, str] = {}
  complete = [(image, reference) for image, reference in pairs.items() if reference is not None]

  def score(batch: Sequence[tuple[Path, Path]]) -> None:
    both = [embed([read(pair[side]) for pair in batch]) for side in (0, 1)]
    for (image, _), value in zip(batch, np.sum(both[0] * both[1], axis=-1), strict=True):
      values[image] = float(value) if math.isfinite(value) else None
      if values[image] is None:
        problems[image] = f"{image.name}: its similarity under {kind} is not a finite number"

  with tqdm(total=len(complete), desc=f"bench {kind}", unit="pair") as bar:
    for start in range(0, len(complete), BATCH):
      batch = complete[start : start + BATCH]
      try:
        score(batch)
      except Exception:  # One bad file must not take its batch with it.
        for one in batch:
          try:
            score([one])
          except Exception as error:  # Readers and embedders raise many exception types.
            text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            problems[one[0]] = text if any(str(file) in text for file in one) else f"{one[0].name}: {text}"
      bar.update(len(batch))
  return values, problems


def by_name(values: Mapping[Path, float | None]) -> dict[str, float | None]:
  """Similarities by file name, as in the official result; of equal names in several folders, the last one counts."""
  return {image.name: value for image, value in values.items()}


def statistics(values: Mapping[str, float | None]) -> dict[str, Any] | None:
  """Computes the statistics of one embedder in the official format; None without a valid pair."""
  valid = [value for value in values.values() if value is not None]
  if not valid:
    return None
  return {
    "total_images": len(values),
    "valid_pairs": len(valid),
    "average_similarity": sum(valid) / len(valid),
    "min_similarity": min(valid),
    "max_similarity": max(valid),
  }


def official_result(scores: Scores) -> dict[str, Any]:
  """Builds the content of the official result file; an embedder without a valid pair has no statistics."""
  values = {kind: by_name(by_image) for kind, by_image in scores.similarities.items()}
  found = {kind: entry for kind, by_file in values.items() if (entry := statistics(by_file))}
  averages = {kind: entry["average_similarity"] for kind, entry in found.items()}
  return {
    "model_types": list(values),
    "similarities_by_model": values,
    "statistics_by_model": found,
    "summary": _summary(averages) if averages else {},
  }


def _summary(averages: Mapping[str, float]) -> dict[str, Any]:
  best, worst = (choose(averages.items(), key=lambda pair: pair[1]) for choose in (max, min))
  return {
    "models_used": list(averages),
    "average_scores_by_model": dict(averages),
    "overall_average": sum(averages.values()) / len(averages),
    "best_model": list(best),
    "worst_model": list(worst),
  }


def write_table(file: Path, scores: Scores) -> None:
  """Writes a CSV with one line per reconstruction: original, reconstruction, similarity per embedder, their mean."""
  table = io.StringIO(newline="")
  writer = csv.writer(table)
  writer.writerow(["reference", "reconstruction", *scores.similarities, "mean"])
  for image, reference in scores.pairs.items():
    values = [by_image[image] for by_image in scores.similarities.values()]
    row = [shown(reference.name) if reference else "", shown(image.name), *values, scores.mean(image)]
    writer.writerow(["" if cell is None else f"{cell:.6f}" if isinstance(cell, float) else cell for cell in row])
  write_whole(file, table.getvalue())
