"""Images that no stage trains on, with what is known about them."""

from collections.abc import Sequence
import dataclasses

import numpy as np
from PIL import Image

from uae_jax.data.pipeline import fit
from uae_jax.data.processing import Processor
from uae_jax.data.sources import open_source
from uae_jax.small_world import caption_scores, scenes
from uae_jax.small_world.scenes import Scene

PLAIN, PAIRS = "held_out", "held_out_pairs"


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut:
  """N images of one split.

  Attributes:
    images: uint8[N, H, W, 3], to be reconstructed.
    captioner_images: uint8[N, h, w, 3], the same as the captioner sees them.
    captions: full captions, or "" where there is none.
    truth: the scenes, of the small world only.
  """

  images: np.ndarray
  captioner_images: np.ndarray
  captions: tuple[str, ...]
  truth: Scene | None = None

  @property
  def has_captions(self) -> bool:
    return all(self.captions)

  def scores(self, texts: Sequence[str]) -> list[caption_scores.CaptionScore]:
    """Each caption against its scene; empty where there is no ground truth."""
    return [] if self.truth is None else [caption_scores.score(text, self.truth[i]) for i, text in enumerate(texts)]

  def figures(self, texts: Sequence[str]) -> dict:
    """Recall, precision and length against the ground truth, or words alone where there is none."""
    if self.truth is not None:
      return caption_scores.aggregate(self.scores(texts))
    figures = {"caption_length": mean_words(texts)}
    return figures | ({"true_caption_length": mean_words(self.captions)} if self.has_captions else {})

  def first(self, count: int) -> "HeldOut":
    truth = None if self.truth is None else self.truth[:count]
    return HeldOut(self.images[:count], self.captioner_images[:count], self.captions[:count], truth)


def mean_words(texts: Sequence[str]) -> float:
  return float(np.mean([len(text.split()) for text in texts]))


def of_scenes(count: int, variant: str) -> dict[str, HeldOut]:
  """Held-out scenes, and scenes with shape-color pairs that training never shows."""
  found = {}
  for split in (PLAIN, PAIRS):
    scene = scenes.scenes(np.arange(count), split, scenes.variant(variant))
    images = scenes.render_batch(scene)
    found[split] = HeldOut(images, images, tuple(scenes.full_caption(scene[i]) for i in range(count)), scene)
  return found


def of_records(data, processor: Processor, count: int) -> dict[str, HeldOut]:
  """The first `count` records of the source's held-out split.

  Raises:
    ValueError: the source has no such split, or too few records that can be read.
  """
  source = open_source(data.source, PLAIN, data_dir=data.data_dir)
  side = processor.square_px(data.image_px)
  images, seen, captions = [], [], []
  for index in range(len(source)):
    if len(images) == count:
      break
    try:
      record = source[index]
      Image.fromarray(record["image"])
    except Exception:  # A torn file can fail in any decoder; the next record takes its place.
      continue
    images.append(fit(record["image"], data.image_px))
    seen.append(fit(record["image"], side))
    captions.append(record["caption"])
  if len(images) < count:
    raise ValueError(
      f"config.evaluation.num_images = {count}, but the held-out split of {data.source} has {len(images)} records "
      "that can be read"
    )
  return {PLAIN: HeldOut(np.stack(images), np.stack(seen), tuple(captions))}
