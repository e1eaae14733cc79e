"""What a source contains: sizes and shapes of its images, lengths of its captions, duplicates, unreadable records."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import hashlib

import numpy as np
from tqdm import tqdm

from uae_jax.data.bad_records import describe
from uae_jax.data.buckets import nearest_buckets
from uae_jax.data.caption_lengths import CaptionLengths
from uae_jax.data.processing import Processor
from uae_jax.data.sources import Source, Stored
from uae_jax.files import shown
from uae_jax.options import DataOptions
from uae_jax.options.buckets import name

# Upper ends of the bins of width / height, and their names.
RATIOS = ((0.6, "tall, below 3:5"), (0.9, "portrait"), (1.1, "square"), (1.7, "landscape"), (np.inf, "wide, above 5:3"))
NUM_SHOWN = 24


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
  """What was found in a sample of a source.

  Attributes:
    num_records: records of the source.
    sizes: int64[count, 2], (height, width) in pixels of the images that could be read.
    captions: their captions, "" for none.
    unreadable: `KEY (reason)` of the records that could not be read.
    shown: (key, image, caption) of a few records.
    duplicates: (key, key of the first such record) of the records whose image has the pixels of an earlier one.
    lengths: lengths of the captions in tokens; None without a tokenizer.
  """

  num_records: int
  sizes: np.ndarray
  captions: Sequence[str]
  unreadable: Sequence[str]
  shown: Sequence[tuple[str, np.ndarray, str]]
  duplicates: Sequence[tuple[str, str]] = ()
  lengths: CaptionLengths | None = None

  def rows(self) -> list[tuple[str, str]]:
    """(name, value) pairs, for people."""
    num_read = len(self.sizes)
    rows = [("records", f"{self.num_records:,}"), ("looked at", f"{num_read + len(self.unreadable):,}")]
    rows.append(("unreadable", f"{len(self.unreadable):,}"))
    rows.append(("images with the pixels of an earlier one", f"{len(self.duplicates):,}"))
    texts = [text for text in self.captions if text]
    rows.append(("captions equal to an earlier one", f"{len(texts) - len(set(texts)):,}"))
    if num_read:
      for name, values in (("height", self.sizes[:, 0]), ("width", self.sizes[:, 1])):
        low, middle, high = (int(np.percentile(values, q)) for q in (0, 50, 100))
        rows.append((f"{name} in pixels", f"{low} to {high}, median {middle}"))
      ratios = self.sizes[:, 1] / self.sizes[:, 0]
      counts = Counter(next(name for end, name in RATIOS if ratio < end) for ratio in ratios.tolist())
      rows += [(f"shape: {name}", f"{100 * counts[name] / num_read:.1f} %") for _, name in RATIOS if counts[name]]
      words = np.asarray([len(text.split()) for text in texts])
      rows.append(("without caption", f"{num_read - len(words):,}"))
      if len(words):
        rows.append(("words per caption", f"{words.min()} to {words.max()}, median {int(np.median(words))}"))
    if self.lengths is not None and len(self.lengths.tokens):
      plain = self.lengths.to_plain()
      rows.append(
        ("tokens per caption", f"{plain['min']} to {plain['max']}, median {plain['p50']}, 99 % up to {plain['p99']}")
      )
      rows.append((f"longer than {self.lengths.budget} tokens", f"{100 * plain['cut'] / plain['captions']:.1f} %"))
      rows += [(f"captions of {low} to {high} tokens", f"{count:,}") for low, high, count in self.lengths.histogram()]
    return rows


def inspect(
  source: Source, count: int, processor: Processor | None = None, caption_tokens: int = 512, num_threads: int = 4
) -> Statistics:
  """Reads evenly spaced records of a source.

  Args:
    source: the source.
    count: number of records; 0 reads all.
    processor: tokenizer for the lengths of captions; None for none.
    caption_tokens: budget that the lengths are compared with.
    num_threads: threads that read.
  """
  indices = np.unique(np.linspace(0, len(source) - 1, count or len(source)).astype(int)).tolist()
  kept = set(indices[:: -(-len(indices) // NUM_SHOWN)])

  def read(index: int):
    try:
      record = source[index]
    except Exception as error:  # A damaged file can raise anything.
      return f"{shown(source.key(index))} ({describe(error)})"
    image = record.get("image")
    size = (0, 0) if image is None else image.shape[:2]
    # Of decoded pixels: the same picture in another file format without losses counts as well.
    pixels = None if image is None else hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).digest()
    sample = (source.key(index), image, record["caption"]) if index in kept else None
    return (source.key(index), pixels), size, record["caption"], sample

  with ThreadPoolExecutor(num_threads) as pool:
    found = list(tqdm(pool.map(read, indices), total=len(indices), unit="record", desc="inspect"))
  good = [value for value in found if not isinstance(value, str)]
  captions = [caption for _, _, caption, _ in good]
  first: dict[bytes, str] = {}
  duplicates = [
    (key, first[pixels])
    for (key, pixels), *_ in good
    if pixels is not None and first.setdefault(pixels, key) is not key
  ]
  return Statistics(
    len(source),
    np.asarray([size for _, size, *_ in good if size != (0, 0)], np.int64).reshape(-1, 2),
    captions,
    [value for value in found if isinstance(value, str)],
    [sample for *_, sample in good if sample is not None and sample[1] is not None],
    duplicates,
    None if processor is None else CaptionLengths.of(captions, processor, caption_tokens),
  )


def bucket_rows(pictures: np.ndarray, data: DataOptions) -> list[tuple[str, str]]:
  """(name, value) pairs: how many pictures go to each size of training, and how much of them is cropped.

  Args:
    pictures: int64[count, 2], (height, width) in pixels.
    data: names the buckets.
  """
  if not len(pictures):
    return []
  nearest, crop = nearest_buckets(pictures, data.image_sizes)
  is_taken = (crop <= data.max_crop) | (not data.buckets)
  rows = []
  for bucket, size in enumerate(data.image_sizes):
    crops = 100 * crop[(nearest == bucket) & is_taken]
    share = f"{100 * len(crops) / len(pictures):.1f} %"
    if len(crops):
      share += f", of which {crops.mean():.1f} % is cropped on average, {crops.max():.1f} % at most"
    rows.append((f"bucket {name(size)}", share))
  if data.buckets:
    rows.append(("in no bucket", f"{100 * np.mean(~is_taken):.1f} %"))
  return rows


def table(source: Source, statistics: Statistics) -> list[tuple[str, str]]:
  """(name, value) pairs: what identifies the data, and what was found in them."""
  noted = source.fingerprint() if isinstance(source, Stored) else {}
  return [*((name, str(value)) for name, value in noted.items() if name != "records"), *statistics.rows()]
