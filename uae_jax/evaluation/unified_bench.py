"""Unified-Bench, protocol 1: how alike originals and their reconstructions are to several image embedders.

Source: the scoring script of PKU-YuanGroup/UAE: pairing by file name, then stem, then `recon_` + stem; cosine
similarity under each embedder's own preprocessing; the result file's fields.
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
    pairs: reference -> its reconstruction, None where there is none.
    similarities: embedder -> file name of the reference -> cosine, None where a file is missing or unreadable.
    unreadable: file -> what is wrong with it.
  """

  pairs: dict[Path, Path | None]
  similarities: dict[str, dict[str, float | None]]
  unreadable: dict[Path, str]

  @property
  def averages(self) -> dict[str, float | None]:
    """Embedder -> mean over valid pairs."""
    return {name: statistics(values)["average_similarity"] for name, values in self.similarities.items()}

  def mean(self, file: str) -> float | None:
    """Mean over the embedders of one reference: its unified score, out of 1."""
    values = [by_file[file] for by_file in self.similarities.values()]
    return None if any(value is None for value in values) else float(np.mean(values))

  def ranked(self) -> list[Path]:
    """References with all similarities, best first."""
    scored = [reference for reference in self.pairs if self.mean(reference.name) is not None]
    return sorted(scored, key=lambda reference: -self.mean(reference.name))


def image_files(folder: Path) -> list[Path]:
  """The images of a folder in the order of their names.

  Raises:
    ValueError: it is no folder, or there is no image in it.
  """
  if not folder.is_dir():
    raise ValueError(f"{folder}: no such folder")
  files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
  if not files:
    raise ValueError(f"{folder}: no image in it")
  return files


def pair(references: Sequence[Path], images: Sequence[Path]) -> dict[Path, Path | None]:
  """The reconstruction of each reference: the same file name, else the same stem, else `recon_` + stem."""
  by_name = {image.name: image for image in images}
  by_stem: dict[str, Path] = {}
  for image in images:
    by_stem.setdefault(image.stem, image)
  return {
    reference: by_name.get(reference.name) or by_stem.get(reference.stem) or by_stem.get(PREFIX + reference.stem)
    for reference in references
  }


def score(pairs: Mapping[Path, Path | None], embedders: Mapping[str, Embed], readable: Callable[[Path], object]):
  """Similarities under every embedder, with a progress bar over images and embedders.

  Args:
    pairs: of `pair`.
    embedders: name -> function of files to unit-norm embeddings float32[B, E].
    readable: raises ValueError for a file that is no image.

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
  """The official figures of one embedder; null where there is no pair."""
  valid = [value for value in values.values() if value is not None]
  return {
    "total_images": len(values),
    "valid_pairs": len(valid),
    "average_similarity": float(np.mean(valid)) if valid else None,
    "min_similarity": min(valid, default=None),
    "max_similarity": max(valid, default=None),
  }


def official_result(scores: Scores) -> dict[str, Any]:
  """The official result file."""
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
  """One line per image: reference, reconstruction, one similarity per embedder, their mean."""
  table = io.StringIO(newline="")
  writer = csv.writer(table)
  writer.writerow(["reference", "reconstruction", *scores.similarities, "mean"])
  for reference, image in scores.pairs.items():
    values = [by_file[reference.name] for by_file in scores.similarities.values()]
    row = [reference.name, image.name if image else "", *values, scores.mean(reference.name)]
    writer.writerow(["" if cell is None else f"{cell:.6f}" if isinstance(cell, float) else cell for cell in row])
  write_whole(file, table.getvalue())
