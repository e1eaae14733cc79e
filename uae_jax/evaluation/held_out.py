"""Held-out images, which no stage trains on, with their captions and ground truth where these exist."""

from collections.abc import Iterator, Sequence
import dataclasses
from typing import Any, Protocol

from absl import logging
import numpy as np
from PIL import Image

from uae_jax.data.bad_records import describe
from uae_jax.data.buckets import fit
from uae_jax.data.mixture import Mixture
from uae_jax.data.processing import Processor
from uae_jax.data.sources import HELD_OUT, HELD_OUT_PAIRS, KnowsTruth, MakesBatches, Source, open_source
from uae_jax.files import shown

PLAIN, PAIRS = HELD_OUT, HELD_OUT_PAIRS


class Truth(Protocol):
  """Protocol for the ground truth of N images, e.g. `small_world.ground_truth.GroundTruth`."""

  def first(self, count: int) -> "Truth":
    """Returns the ground truth of the first `count` images."""
    ...

  def scores(self, texts: Sequence[str]) -> list[Any]:
    """Returns the score of each caption, with `words` (word, verdict), `missing` and `num_true`."""
    ...

  def figures(self, texts: Sequence[str]) -> dict[str, float]:
    """Returns `caption_recall`, `caption_precision` and lengths, given one caption per image."""
    ...

  def image_figures(self, images: np.ndarray) -> dict[str, float]:
    """Returns metrics of reconstructions uint8 or float [N, H, W, 3] in 0..255."""
    ...

  def following(self, images: np.ndarray) -> dict[str, float]:
    """Returns how well images uint8 or float [N, H, W, 3] in 0..255, generated from the true captions, follow them."""
    ...

  def forced_choices(self) -> list[Any]:
    """Returns changed captions of every image, one list per kind of change, see `small_world.forced_choice`."""
    ...

  def choice_figures(self, choices: list[Any], is_right: np.ndarray) -> dict[str, float]:
    """Returns the shares of right choices, given bool[N, kinds]: whether the true caption is the more likely one."""
    ...

  def edited_images(self) -> np.ndarray:
    """Returns a copy of each image with one change, uint8[N, H, W, 3]."""
    ...


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut:
  """N images of one held-out split.

  Attributes:
    images: uint8[N, H, W, 3], to be reconstructed.
    captioner_images: uint8[N, h, w, 3], the same images at the captioner's resolution.
    captions: N full captions, "" for an image without one.
    truth: ground truth of the images, or None if the source has none.
    sources: number of the source of each image, from 0, if the data are a mixture; else empty.
  """

  images: np.ndarray
  captioner_images: np.ndarray
  captions: tuple[str, ...]
  truth: Truth | None = None
  sources: tuple[int, ...] = ()

  @property
  def has_captions(self) -> bool:
    return all(self.captions)

  def scores(self, texts: Sequence[str]) -> list[Any]:
    """Returns the score of each caption; empty without ground truth."""
    return [] if self.truth is None else self.truth.scores(texts)

  def figures(self, texts: Sequence[str]) -> dict[str, float]:
    """Returns recall, precision and length of captions against the ground truth, or only lengths without it."""
    if self.truth is not None:
      return self.truth.figures(texts)
    figures = {"caption_length": mean_words(texts)}
    return figures | ({"true_caption_length": mean_words(self.captions)} if self.has_captions else {})

  def first(self, count: int) -> "HeldOut":
    truth = None if self.truth is None else self.truth.first(count)
    return HeldOut(
      self.images[:count], self.captioner_images[:count], self.captions[:count], truth, self.sources[:count]
    )

  def by_source(self, name: str, values: np.ndarray) -> dict[str, float]:
    """Returns `source_<number>_<name>`, the mean of a value per image, float[N], for each source of a mixture."""
    numbers = np.asarray(self.sources)
    return {f"source_{i + 1}_{name}": float(np.mean(values[numbers == i])) for i in sorted(set(self.sources))}


def mean_words(texts: Sequence[str]) -> float:
  return float(np.mean([len(text.split()) for text in texts]))


def load(data, processor: Processor, count: int) -> dict[str, HeldOut]:
  """Loads the first `count` readable records of each held-out split of a source.

  Args:
    data: `config.data`.
    processor: image processor of the captioner.
    count: images per split, `config.evaluation.num_images`; 0 loads no split.

  Returns:
    name of the split -> its images, for "held_out" and the splits that the source lists in `more_held_out`.

  Raises:
    ValueError: the source has no held-out split, or too few readable records.
  """
  if not count:
    return {}
  source = open_source(data, PLAIN)
  more = {split: open_source(data, split) for split in getattr(source, "more_held_out", ())}
  return {split: _load(source, split, data, processor, count) for split, source in {PLAIN: source, **more}.items()}


def _load(source: Source, split: str, data, processor: Processor, count: int) -> HeldOut:
  found = dict(_readable(source, count))
  records = list(found.values())
  if len(records) < count:
    raise ValueError(
      f"config.evaluation.num_images = {count}, but split {split} of data.source = {data.source} has {len(records)} "
      "records that can be read: lower num_images or add records"
    )
  size = (data.image_px, data.image_px)
  captioner_size = processor.resized_size(*size)
  return HeldOut(
    np.stack([fit(record["image"], size) for record in records]),
    np.stack([fit(record["image"], captioner_size) for record in records]),
    tuple(record["caption"] for record in records),
    source.ground_truth(records) if isinstance(source, KnowsTruth) else None,
    tuple(map(source.source_of, found)) if isinstance(source, Mixture) else (),
  )


def _readable(source: Source, count: int) -> Iterator[tuple[int, dict]]:
  """Yields (index, record) of at most `count` readable records."""
  if isinstance(source, MakesBatches):
    yield from enumerate(source.records(range(min(count, len(source)))))
    return
  for index in range(len(source)):
    if not count:
      return
    try:
      record = source[index]
      Image.fromarray(record["image"])
    except Exception as error:  # A damaged file can raise any exception when decoded; the next record is used instead.
      logging.warning("skipped held-out record %s (%s)", shown(source.key(index)), describe(error))
      continue
    count -= 1
    yield index, record
