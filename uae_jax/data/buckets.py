"""Aspect-ratio buckets: which size every picture of a source is cropped to, from the sizes in the headers of its files.

A picture goes to the bucket of the nearest aspect ratio: it is scaled to fill it, and what is left over at two opposite
sides is cropped. Where the aspect ratios of picture and bucket are r and b, that is 1 - min(r, b) / max(r, b) of it.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import io
import json
import os
from pathlib import Path
import zlib

import numpy as np
from PIL import Image, ImageOps

from uae_jax import cloud_storage
from uae_jax.data.images import open_image
from uae_jax.data.mixture import Mixture
from uae_jax.data.prompts_source import PromptsSource
from uae_jax.data.sources import KeepsFiles, MakesBatches, Source, Stored
from uae_jax.data.stored_index import load_or_build
from uae_jax.files import is_in_cloud
from uae_jax.options import DataOptions, mixture
from uae_jax.options.buckets import Size, name
from uae_jax.options.data import PATH_KINDS

# EXIF's tag of the orientation, and the values that exchange height and width.
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)
# Number of headers that a thread reads in one go.
CHUNK = 1024
# In place of a size: the header cannot be read; the record has no image.
UNREADABLE, WITHOUT_IMAGE = (0, 0), (-1, -1)
NO_BUCKET = -1


@dataclasses.dataclass(frozen=True, eq=False)
class Buckets:
  """The bucket of every record of a source.

  Attributes:
    sizes: (height, width) of each bucket, in pixels.
    of: int16[records], bucket of each record; `NO_BUCKET` for a record that is not trained on.
    max_crop: largest fraction of a picture that is cropped.
  """

  sizes: tuple[Size, ...]
  of: np.ndarray
  max_crop: float

  @property
  def counts(self) -> dict[str, int]:
    """Records per bucket, by the bucket's name."""
    return {name(size): int(np.sum(self.of == bucket)) for bucket, size in enumerate(self.sizes)}

  def fingerprint(self) -> dict[str, int | str]:
    """Quantities that are the same if every record is in the same bucket."""
    return {**self.counts, "checksum of buckets": f"{zlib.crc32(self.of.tobytes()):08x}"}

  def describe(self) -> str:
    counts = ", ".join(f"{count:,} of {size}" for size, count in self.counts.items())
    return f"pictures per bucket: {counts}; {int(np.sum(self.of == NO_BUCKET)):,} in none"

  def others(self, index: int) -> Iterator[int]:
    """Yields a record and then all others of its bucket, in the order of the source."""
    yield index
    members = np.flatnonzero(self.of == self.of[index])
    start = int(np.searchsorted(members, index))
    yield from np.roll(members, -start)[1:].tolist()

  def check(self, picture: Size, bucket: int) -> None:
    """Checks how much of a picture a bucket crops.

    Raises:
      ValueError: more than `max_crop`, or the bucket is `NO_BUCKET`.
    """
    height, width = picture
    nearest, crop = nearest_buckets(np.asarray([picture]), self.sizes)
    size = self.sizes[int(nearest[0])]
    if bucket == NO_BUCKET or cropped(height, width, self.sizes[bucket]) > self.max_crop:
      raise ValueError(
        f"no bucket takes its {width} x {height} pixels: data.buckets {name(size)} comes nearest and crops "
        f"{100 * crop[0]:.0f} %, more than data.max_crop = {self.max_crop}"
      )


def cropped(height: int, width: int, size: Size) -> float:
  """Fraction of a picture that is cropped when it fills a size (height, width)."""
  ratios = width / height, size[1] / size[0]
  return 1 - min(ratios) / max(ratios)


def nearest_buckets(pictures: np.ndarray, sizes: Sequence[Size]) -> tuple[np.ndarray, np.ndarray]:
  """Finds the bucket that crops least of each picture; of two, the first.

  Args:
    pictures: int[N, 2], (height, width) in pixels.
    sizes: (height, width) of each bucket.

  Returns:
    (bucket int16[N], fraction of the picture that it crops float64[N]).
  """
  ratio = pictures[:, 1] / pictures[:, 0]
  nearest, least = np.zeros(len(ratio), np.int16), np.full(len(ratio), np.inf)
  for bucket, (height, width) in enumerate(sizes):
    other = width / height
    crop = 1 - np.minimum(ratio, other) / np.maximum(ratio, other)
    nearest, least = np.where(crop < least, np.int16(bucket), nearest), np.minimum(crop, least)
  return nearest, least


def fit(image: np.ndarray, size: Size, shape: Size | None = None) -> np.ndarray:
  """Crops the center of an image to an aspect ratio and resizes it; the identity at that size.

  Args:
    image: uint8[H, W, 3].
    size: (height, width) of the result.
    shape: (height, width) with the aspect ratio of what is kept; None takes that of `size`.

  Returns:
    uint8[*size, 3].
  """
  if image.shape == (*size, 3) and shape in (None, size):
    return image
  height, width = size
  rows, columns = shape or size
  picture = Image.fromarray(image)
  if rows * width == columns * height:
    return np.asarray(ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC))
  kept_height = min(picture.height, picture.width * rows / columns)
  kept_width = min(picture.width, picture.height * columns / rows)
  left, top = (picture.width - kept_width) / 2, (picture.height - kept_height) / 2
  box = (left, top, left + kept_width, top + kept_height)
  return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, box=box))


# --- The buckets of a source ------------------------------------------------------------------------------------------


def assign(source: Source, data: DataOptions, *, on_bad: Callable[[int, Exception], None] | None = None) -> Buckets:
  """Finds the bucket of every record of a source of `data`.

  A record without an image goes to the buckets in turn.

  Args:
    source: the training split.
    data: `config.data`, with `buckets`.
    on_bad: called with (index, error) for every record that no bucket takes.

  Raises:
    ValueError: the source makes its images itself.
  """
  if isinstance(source, MakesBatches):
    raise ValueError(f"data.buckets = {data.buckets}: the images of data.source = {data.source!r} are all squares")
  pictures = np.array(_stored_sizes(source, data))
  # What could not be read when the sizes were stored may have been repaired since.
  for index in np.flatnonzero(np.all(pictures == UNREADABLE, axis=1)).tolist():
    pictures[index] = _size_or_unreadable(source, index)
  is_picture: np.ndarray = np.all(pictures > 0, axis=1)
  of = np.full(len(pictures), NO_BUCKET, np.int16)
  nearest, crop = nearest_buckets(pictures[is_picture], data.image_sizes)
  of[is_picture] = np.where(crop <= data.max_crop, nearest, NO_BUCKET)
  without = np.flatnonzero(np.all(pictures == WITHOUT_IMAGE, axis=1))
  of[without] = np.arange(len(without)) % len(data.image_sizes)
  buckets = Buckets(data.image_sizes, of, data.max_crop)
  if on_bad is not None:
    for index in np.flatnonzero(of == NO_BUCKET).tolist():
      try:
        buckets.check(tuple(pictures[index].tolist()) if is_picture[index] else header_size(source, index), NO_BUCKET)
      except Exception as error:  # A damaged file can raise anything.
        on_bad(index, error)
  return buckets


def header_size(source: Source, index: int) -> Size:
  """(height, width) of the upright picture of a record, from the header of its file if the source keeps files."""
  if isinstance(source, PromptsSource):
    return WITHOUT_IMAGE
  if not isinstance(source, KeepsFiles):
    height, width = source[index]["image"].shape[:2]
    return height, width
  content, _ = source.content(index)
  with open_image(content if isinstance(content, Path) else io.BytesIO(content)) as image:
    width, height = image.size
    # PIL decodes a PNG file to find out that it has no EXIF.
    has_exif = image.format != "PNG" or "exif" in image.info
    is_turned = has_exif and image.getexif().get(ORIENTATION) in TURNED
  return (width, height) if is_turned else (height, width)


def _size_or_unreadable(source: Source, index: int) -> Size:
  try:
    return header_size(source, index)
  except Exception:  # A damaged file can raise anything.
    return UNREADABLE


def _stored_sizes(source: Source, data: DataOptions) -> np.ndarray:
  """The size of the picture of every record, int32[records, 2], kept in the index of each source."""
  if not isinstance(source, Mixture):
    return _sizes_of_one(source, data.source, data)
  _, _, parts = data.source.partition(":")
  names = [part for _, part in mixture.parse(parts)]
  found = [_sizes_of_one(part, part_name, data) for part, part_name in zip(source.sources, names, strict=True)]
  return np.concatenate(found)


def _sizes_of_one(source: Source, source_name: str, data: DataOptions) -> np.ndarray:
  if isinstance(source, PromptsSource):
    return np.full((len(source), 2), WITHOUT_IMAGE, np.int32)

  def read(start: int) -> np.ndarray:
    indices = range(start, min(start + CHUNK, len(source)))
    return np.asarray([_size_or_unreadable(source, index) for index in indices], np.int32).reshape(-1, 2)

  def build():
    with ThreadPoolExecutor(16) as pool:
      return [], {"sizes": np.concatenate(list(pool.map(read, range(0, len(source), CHUNK))))}

  # Other data of the same name have another fingerprint, and another index.
  noted = source.fingerprint() if isinstance(source, Stored) else {}
  checksum = zlib.crc32(json.dumps(noted, sort_keys=True).encode())
  kind, _, rest = source_name.partition(":")
  folder = "" if is_in_cloud(rest) else data.data_dir
  path = os.path.join(folder, rest if kind in PATH_KINDS else source_name)
  if is_in_cloud(path):
    path = os.fspath(cloud_storage.copy_of(path.replace("{split}", "train")))
  name_of_index, place = os.path.abspath(path), data.index_dir or _folder_of(path)
  return load_or_build(f"sizes-{checksum:08x}", name_of_index, place, build)["sizes"]


def _folder_of(path: str) -> str:
  """The folder that a path or glob is in, above all of its wildcards."""
  folder = os.path.dirname(os.path.abspath(path.replace("{split}", "train")))
  while any(character in folder for character in "*?["):
    folder = os.path.dirname(folder)
  return folder
