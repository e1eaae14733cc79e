"""Unified-Bench, protocol 1: similarity of originals and their reconstructions under several image embedders.

Source: the scoring script of PKU-YuanGroup/UAE: pairing by file name, then stem, then `recon_` + stem; cosine
similarity under each embedder's own preprocessing; the fields of the result file.
"""

from collections.abc import Callable, Mapping, Sequence
import csv
import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from uae_jax.files import IMAGE_SUFFIXES, write_whole

SUFFIXES = IMAGE_SUFFIXES - {".ppm"}
PREFIX = "recon_"
BATCH = 64

Embed = Callable[[Sequence[Path]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Scores:
  """Similarities of every reference under every embedder.

  Attributes:
    pairs: reference -> its reconstruction, or None.
    similarities: embedder -> file name of the reference -> cosine similarity, None if a file is missing or unreadable.
    unreadable: file -> error message.
  """

  pairs: dict[Path, Path | None]
  similarities: dict[str, dict[str, float | None]]
  unreadable: dict[Path, str]

  @property
  def averages(self) -> dict[str, float | None]:
    """Mean similarity over valid pairs per embedder; None without a valid pair."""
    return {name: statistics(values)["average_similarity"] for name, values in self.similarities.items()}

  def mean(self, file: str) -> float | None:
    """Returns the unified score of one reference, the mean over the embedders; None if a similarity is missing."""
    values = [value for by_file in self.similarities.values() if (value := by_file[file]) is not None]
    return float(np.mean(values)) if len(values) == len(self.similarities) else None

  def ranked(self) -> list[Path]:
    """Returns the references that have all similarities, best first."""
    scored = [(mean, reference) for reference in self.pairs if (mean := self.mean(reference.name)) is not None]
    return [reference for _, reference in sorted(scored, key=lambda pair: -pair[0])]


def image_files(folder: Path) -> list[Path]:
  """Lists the images of a folder, sorted by name.

  Raises:
    ValueError: the folder does not exist or contains no image.
  """
  if not folder.is_dir():
    raise ValueError(f"{folder}: no such folder")
  files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
  if not files:
    raise ValueError(f"{folder}: no image in it")
  return files


def pair(references: Sequence[Path], images: Sequence[Path]) -> dict[Path, Path | None]:
  """Finds the reconstruction of each reference: by the same file name, else the same stem, else `recon_` + stem."""
  by_name = {image.name: image for image in images}
  by_stem: dict[str, Path] = {}
  for image in images:
    by_stem.setdefault(image.stem, image)
  return {
    reference: by_name.get(reference.name) or by_stem.get(reference.stem) or by_stem.get(PREFIX + reference.stem)
    for reference in references
  }


def score(pairs: Mapping[Path, Path | None], embedders: Mapping[str, Embed], readable: Callable[[Path], object]):
  """Computes similarities under every embedder, with a progress bar over images and embedders.

  Args:
    pairs: result of `pair`.
    embedders: name -> function from B files to unit-norm embeddings float32[B, E].
    readable: raises `ValueError` for a file that is not a readable image.

  Raises:
    ValueError: there is no readable pair.
  """
  unreadable = {}
  for file in {file for both in pairs.items() for file in both if file is not None}:
    try:
      readable(file)
    except ValueError as error:
      unreadable[file] = str(error)
  valid = [
    (reference, image)
    for reference, image in pairs.items()
    if image is not None and reference not in unreadable and image not in unreadable
  ]
  if not valid:
    raise ValueError("no reference has a readable reconstruction: names must be equal, or recon_ + stem")
  similarities = {}
  with tqdm(total=len(valid) * len(embedders), desc="bench", unit="pair") as bar:
    for name, embed in embedders.items():
      values: dict[str, float | None] = {reference.name: None for reference in pairs}
      for start in range(0, len(valid), BATCH):
        batch = valid[start : start + BATCH]
        originals, generated = (embed([both[side] for both in batch]) for side in (0, 1))
        for (reference, _), value in zip(batch, np.sum(originals * generated, axis=-1), strict=True):
          values[reference.name] = float(value)
        bar.update(len(batch))
      similarities[name] = values
  return Scores(dict(pairs), similarities, unreadable)


def statistics(values: Mapping[str, float | None]) -> dict[str, Any]:
  """Computes the statistics of one embedder in the official format; None without a valid pair."""
  valid = [value for value in values.values() if value is not None]
  return {
    "total_images": len(values),
    "valid_pairs": len(valid),
    "average_similarity": float(np.mean(valid)) if valid else None,
    "min_similarity": min(valid, default=None),
    "max_similarity": max(valid, default=None),
  }


def official_result(scores: Scores) -> dict[str, Any]:
  """Builds the content of the official result file."""
  averages = scores.averages
  ranked = sorted(((name, value) for name, value in averages.items() if value is not None), key=lambda pair: pair[1])
  return {
    "model_types": list(scores.similarities),
    "similarities_by_model": scores.similarities,
    "statistics_by_model": {name: statistics(values) for name, values in scores.similarities.items()},
    "summary": {
      "models_used": list(scores.similarities),
      "average_scores_by_model": averages,
      "overall_average": float(np.mean([value for _, value in ranked])) if ranked else None,
      "best_model": list(ranked[-1]) if ranked else None,
      "worst_model": list(ranked[0]) if ranked else None,
    },
  }


def write_table(file: Path, scores: Scores) -> None:
  """Writes a CSV with one line per reference: reference, reconstruction, one similarity per embedder, their mean."""
  table = io.StringIO(newline="")
  writer = csv.writer(table)
  writer.writerow(["reference", "reconstruction", *scores.similarities, "mean"])
  for reference, image in scores.pairs.items():
    values = [by_file[reference.name] for by_file in scores.similarities.values()]
    row = [reference.name, image.name if image else "", *values, scores.mean(reference.name)]
    writer.writerow(["" if cell is None else f"{cell:.6f}" if isinstance(cell, float) else cell for cell in row])
  write_whole(file, table.getvalue())
