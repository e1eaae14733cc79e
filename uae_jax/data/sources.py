"""Data sources: random access by index, one dict per record.

`config.data.source`:
  scenes            the procedural small world: practically infinite, nothing on disk
  tfds:NAME         a TFDS dataset prepared as ArrayRecord under `data.data_dir`, e.g. tfds:uae_scenes/plain
  jsonl:PATH        one JSON object per line: "image" (path relative to the file) or "image_base64", and "caption"
  arrayrecord:GLOB  the same JSON objects as records of ArrayRecord files
  folder:PATH       images with optional captions in text files of the same name: cat.jpg, cat.txt

PATH may contain {split}; without it the source has only the training split.

To add a kind of source, write a class that satisfies `Source` and add a row to `KINDS`. Captions may be empty: the RL
stages need only images.
"""

import base64
from collections.abc import Callable, Sequence
import glob
import io
import json
import os
from pathlib import Path
import threading
from typing import Protocol, runtime_checkable

from absl import logging
import numpy as np

from uae_jax.files import IMAGE_SUFFIXES

SPLITS = ("train", "held_out", "held_out_pairs")
# Names of the held_out split in published datasets, in order of preference.
HELD_OUT_NAMES = ("held_out", "validation", "val", "test")


class Source(Protocol):
  """Random access to records; optional capabilities are `MakesBatches`, `CaptionsRecords` and `KnowsTruth`.

  A source with ground truth may have further held-out splits besides "held_out"; `more_held_out` lists them.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict:
    """A record: `image` uint8[H, W, 3], `caption` str ("" for none), and fields specific to the source."""
    ...

  def key(self, index: int) -> str:
    """A description that lets a person find the record, for messages."""
    ...


@runtime_checkable
class MakesBatches(Source, Protocol):
  """A source without stored records: batches are made from indices.

  Attributes:
    image_px: side of the square images, in pixels.
  """

  image_px: int

  def records(self, indices: Sequence[int]) -> list[dict]:
    """The records at several indices."""
    ...

  def batch_maker(
    self, processor, caption_tokens: int, captions: str, seed: int
  ) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """A picklable function from int64[b, 2], rows of (position in the endless order, index), to a batch.

    Args:
      processor: a `processing.Processor`, which tokenizes the captions.
      caption_tokens: number of tokens per row.
      captions: one of `pipeline.CAPTIONS`.
      seed: seeds random draws, together with the position.
    """
    ...


@runtime_checkable
class CaptionsRecords(Source, Protocol):
  """A source that can make other captions for a record than the stored one."""

  def record_captioner(
    self, processor, caption_tokens: int, captions: str, seed: int
  ) -> Callable[[dict], dict[str, np.ndarray]]:
    """A picklable function from columns of records to a batch; arguments as for `MakesBatches.batch_maker`."""
    ...


@runtime_checkable
class KnowsTruth(Source, Protocol):
  """A source with ground truth, which can score captions and images of its records."""

  def ground_truth(self, records: Sequence[dict]):
    """The `evaluation.held_out.Truth` of these records."""
    ...


class TFDSSource:
  """A prepared TFDS dataset, read by grain's ArrayRecord reader.

  Args:
    name: name of the dataset with its config, such as uae_scenes/plain.
    split: name of the split; for "held_out", the first of `HELD_OUT_NAMES` that the dataset has.
    data_dir: folder of TFDS datasets; "" uses the default of TFDS.
    extra: names of further features to include in records.
  """

  def __init__(self, name: str, split: str, data_dir: str, *, extra: Sequence[str] = ()):
    import tensorflow_datasets as tfds

    missing = f"data.source = tfds:{name}: no such dataset in data.data_dir = {data_dir!r}"
    try:
      builder = tfds.builder(name, data_dir=data_dir or None)
    except Exception as error:  # The exception type depends on whether TFDS knows the name.
      raise ValueError(missing) from error
    if not builder.info.splits:
      raise ValueError(missing)
    names = HELD_OUT_NAMES if split == "held_out" else (split,)
    found = next((name for name in names if name in builder.info.splits), None)
    if found is None:
      raise ValueError(f"data.source = tfds:{name}: no split {split}, only {', '.join(builder.info.splits)}")
    self._name, self._extra = f"{name} {found}", tuple(extra)
    self.splits = tuple(builder.info.splits)
    self._data = builder.as_data_source(split=found)

  def __len__(self) -> int:
    return len(self._data)

  def __getitem__(self, index: int) -> dict:
    example = self._data[index]
    record = {"image": as_rgb(example["image"]), "caption": _caption_of(example)}
    return record | {name: np.asarray(example[name]) for name in self._extra}

  def key(self, index: int) -> str:
    return f"{self._name} {index}"


class JsonLinesSource:
  """A JSON lines file; lines are indexed once and read on demand, so the file may be larger than memory."""

  def __init__(self, path: str):
    self._path = Path(path)
    with open(self._path, "rb") as file:
      lengths = [len(line) for line in file]
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - np.asarray(lengths, np.int64)
    # Blank lines are not records.
    keep = np.asarray(lengths) > 1
    self._spans = np.stack([starts, ends], 1)[keep]

  def __len__(self) -> int:
    return len(self._spans)

  def __getitem__(self, index: int) -> dict:
    start, end = self._spans[index]
    with open(self._path, "rb") as file:
      file.seek(start)
      return _from_json(file.read(end - start), self._path.parent)

  def key(self, index: int) -> str:
    return f"{self._path} byte {self._spans[index][0]}"


class ArrayRecordSource:
  """JSON objects stored as records of ArrayRecord files."""

  def __init__(self, pattern: str):
    import grain

    paths = sorted(glob.glob(pattern))
    if not paths:
      raise ValueError(f"data.source = arrayrecord:{pattern}: no such file")
    self._pattern = pattern
    self._folder = Path(paths[0]).parent
    self._data = grain.sources.ArrayRecordDataSource(paths)

  def __len__(self) -> int:
    return len(self._data)

  def __getitem__(self, index: int) -> dict:
    return _from_json(self._data[index], self._folder)

  def key(self, index: int) -> str:
    return f"{self._pattern} record {index}"


class FolderSource:
  """The images in a folder and its subfolders, sorted by path."""

  def __init__(self, folder: str):
    root = Path(folder)
    self._paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not self._paths:
      raise ValueError(f"data.source = folder:{folder}: no image ({', '.join(sorted(IMAGE_SUFFIXES))}) there")

  def __len__(self) -> int:
    return len(self._paths)

  def __getitem__(self, index: int) -> dict:
    path = self._paths[index]
    sidecar = path.with_suffix(".txt")
    return {"image": open_rgb(path), "caption": sidecar.read_text().strip() if sidecar.exists() else ""}

  def key(self, index: int) -> str:
    return str(self._paths[index])


def _open_scenes(data, name: str, split: str) -> Source:
  from uae_jax.small_world import scenes, source

  return source.ProceduralScenes(split, scenes.variant(data.variant))


def _open_tfds(data, name: str, split: str) -> Source:
  return TFDS_DATASETS.get(name.partition("/")[0], _open_plain_tfds)(data, name, split)


def _open_plain_tfds(data, name: str, split: str) -> Source:
  return TFDSSource(name, split, data.data_dir)


def _open_stored_scenes(data, name: str, split: str) -> Source:
  from uae_jax.small_world import source

  stored = TFDSSource(name, split, data.data_dir, extra=("scene",))
  more_held_out = [name for name in source.MORE_HELD_OUT if name in stored.splits]
  return source.StoredScenes(stored, source.stored_config(name, data.variant), more_held_out)


def _open_files(kind: Callable[[str], Source]) -> Callable[..., Source]:
  def open_files(data, name: str, split: str) -> Source:
    if split != "train" and "{split}" not in name:
      raise ValueError(f"data.source = {data.source!r} has no split {split}: put {{split}} into the path")
    path = os.path.join(data.data_dir, name.replace("{split}", split))
    try:
      return kind(path)
    except FileNotFoundError as error:
      raise ValueError(f"data.source = {data.source!r}: {path} does not exist") from error

  return open_files


# Prefix of `data.source` -> function (data, rest, split) -> source. A prefix with a colon requires a nonempty rest.
KINDS: dict[str, Callable[..., Source]] = {
  "scenes": _open_scenes,
  "tfds:": _open_tfds,
  "jsonl:": _open_files(JsonLinesSource),
  "arrayrecord:": _open_files(ArrayRecordSource),
  "folder:": _open_files(FolderSource),
}
# TFDS datasets whose records have more than an image and a caption.
TFDS_DATASETS: dict[str, Callable[..., Source]] = {"uae_scenes": _open_stored_scenes}


def open_source(data, split: str) -> Source:
  """Opens the source named by `config.data.source`.

  Args:
    data: `config.data`, an object with `source`, `data_dir` and `variant`.
    split: one of `SPLITS`.

  Raises:
    ValueError: the source does not exist, or does not have the split.
  """
  if split not in SPLITS:
    raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
  kind, colon, name = data.source.partition(":")
  if kind + colon not in KINDS or bool(colon) != bool(name):
    raise ValueError(
      f"data.source = {data.source!r}: expected scenes, tfds:NAME, jsonl:PATH, arrayrecord:GLOB or folder:PATH"
    )
  return KINDS[kind + colon](data, name, split)


class BadRecords:
  """Counts unreadable records, which are skipped, and raises if there are too many. Thread-safe.

  A record counts once over all epochs. The fraction is relative to the number of records read so far, but at least to
  one process's share of an epoch, and at most to the size of the source.

  Args:
    max_fraction: `config.data.max_bad_fraction`, in [0, 1].
    num_records: number of records of the source.
    process_count: number of processes that share an epoch.
    indices: receives the indices of unreadable records; worker processes keep their own.
  """

  def __init__(self, max_fraction: float, num_records: int, process_count: int = 1, indices: set[int] | None = None):
    self._max_fraction, self._num_records, self._process_count = max_fraction, num_records, process_count
    self._lock = threading.Lock()
    self._num_read = 0
    self._bad = set() if indices is None else indices

  def good(self) -> None:
    with self._lock:
      self._num_read += 1

  def bad(self, index: int, key: str, error: Exception) -> None:
    """Counts and logs an unreadable record.

    Raises:
      ValueError: there are too many unreadable records.
    """
    with self._lock:
      self._num_read += 1
      is_new = index not in self._bad
      self._bad.add(index)
      num_bad = len(self._bad)
      num_read = min(max(self._num_read, -(-self._num_records // self._process_count)), self._num_records)
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    if is_new:
      logging.warning("skipped record %s (%s); %d skipped so far", key, reason, num_bad)
    # Even with max_fraction 1, a source without any readable record must not be read forever.
    if num_bad > self._max_fraction * num_read or num_bad == num_read:
      raise ValueError(
        f"{num_bad} of {num_read} records are unreadable, more than data.max_bad_fraction = {self._max_fraction}; "
        f"the last one: {key} ({reason})"
      ) from error

  # Every worker process counts for itself.
  def __getstate__(self):
    return (self._max_fraction, self._num_records, self._process_count)

  def __setstate__(self, state):
    BadRecords.__init__(self, *state)


def as_rgb(image) -> np.ndarray:
  """Converts uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] to uint8[H, W, 3]."""
  image = np.asarray(image)
  if image.dtype != np.uint8 or image.ndim not in (2, 3) or 0 in image.shape:
    raise ValueError(f"image {image.dtype}{list(image.shape)}: expected uint8[H, W, channels]")
  if image.ndim == 2:
    image = image[..., None]
  return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else np.ascontiguousarray(image[..., :3])


def open_rgb(file) -> np.ndarray:
  """Reads an image file or stream as upright uint8[H, W, 3]; transparency becomes white."""
  from PIL import Image

  from uae_jax.data.preprocessing import to_rgb

  with Image.open(file) as image:
    return np.asarray(to_rgb(image))


def _from_json(line: bytes, folder: Path) -> dict:
  record = json.loads(line)
  if "image_base64" in record:
    image = open_rgb(io.BytesIO(base64.b64decode(record["image_base64"], validate=True)))
  else:
    image = open_rgb(folder / record["image"])
  return {"image": image, "caption": str(record.get("caption", ""))}


def _caption_of(example: dict) -> str:
  """The first caption of a TFDS example, from the first common feature name that has one; "" if none does."""
  for name in ("caption", "captions", "text"):
    value = example.get(name)
    if isinstance(value, dict):
      value = value.get("text")
    if isinstance(value, list | tuple | np.ndarray) and len(value):
      value = value[0]
    if isinstance(value, bytes):
      value = value.decode()
    if isinstance(value, str):
      return value
  return ""
