"""Data sources: random access by index, one dict per record.

`config.data.source`:
  scenes            the procedural small world: practically infinite, nothing on disk
  tfds:NAME         a TFDS dataset prepared as ArrayRecord under `data.data_dir`, e.g. tfds:uae_scenes/plain
  jsonl:PATH        one JSON object per line: "image" (path relative to the file) or "image_base64", and "caption";
                    other names of these fields are in `data.records` and `config.data`
  arrayrecord:GLOB  the same JSON objects as records of ArrayRecord files
  parquet:GLOB      rows of Parquet files: an image as bytes, struct or path, and a text or a list of texts
  webdataset:GLOB   tar files with cat.jpg and cat.txt or cat.json
  prompts:PATH      lines of text, or JSON objects with "prompt" and metadata; no images
  mix:W*SOURCE;...  several of these, except scenes, in the proportion of their weights
  folder:PATH       images with optional captions in text files of the same name: cat.jpg, cat.txt or cat.caption

PATH or GLOB may be in a bucket, gs://BUCKET/NAME; `cloud_storage` copies it to this machine when the source is opened.

PATH may contain {split}; without it the source has only the training split. For the held-out split, it stands for the
first of `HELD_OUT_NAMES` that exists.

To add a kind of source, write a class that satisfies `Source` and add a row to `KINDS`. Captions may be empty: the RL
stages need only images.
"""

from collections.abc import Callable, Sequence
import dataclasses
import glob
import os
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from uae_jax import cloud_storage
from uae_jax.data.file_sources import ArrayRecordSource, FolderSource, JsonLinesSource
from uae_jax.data.mixture import Mixture
from uae_jax.data.parquet_source import ParquetSource
from uae_jax.data.prompts_source import PromptsSource
from uae_jax.data.records import Fields
from uae_jax.data.webdataset_source import WebDatasetSource
from uae_jax.files import is_in_cloud
from uae_jax.options import mixture
from uae_jax.options.data import FIRST

HELD_OUT, HELD_OUT_PAIRS = "held_out", "held_out_pairs"
SPLITS = ("train", HELD_OUT, HELD_OUT_PAIRS)
# Names of the held-out split in published datasets, in order of preference.
HELD_OUT_NAMES = (HELD_OUT, "validation", "val", "test")


class Source(Protocol):
  """Random access to records; optional capabilities: `Stored`, `MakesBatches`, `CaptionsRecords` and `KnowsTruth`.

  A source with ground truth may have further held-out splits besides "held_out"; `more_held_out` lists them.
  """

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict:
    """A record: `image` uint8[H, W, 3], `caption` str ("" for none), and fields specific to the source.

    `image` is absent if the source has prompts only; batches then have black images.
    `captions`, a tuple of texts, is there if the pipeline is to draw one of them.
    """
    ...

  def key(self, index: int) -> str:
    """A description that lets a person find the record, for messages."""
    ...


@runtime_checkable
class Stored(Source, Protocol):
  """A source whose records are stored, so that they may be faulty or change between two starts of a run."""

  def caption(self, index: int) -> str:
    """The caption of a record, without reading its image if that is possible."""
    ...

  def fields(self) -> Sequence[str]:
    """Names of the fields of a record, for messages; empty if records have no named fields."""
    ...

  def fingerprint(self) -> dict[str, int | str]:
    """Quantities that identify the data without reading all of it: name -> value."""
    ...


@runtime_checkable
class KeepsFiles(Stored, Protocol):
  """A stored source that has its images as files or their content."""

  def content(self, index: int) -> tuple[bytes | Path, tuple[str, ...]]:
    """The content of the image file of a record, or its path; and its captions."""
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


def _open_scenes(data, name: str, split: str) -> Source:
  from uae_jax.small_world import scenes, source

  return source.ProceduralScenes(split, scenes.variant(data.variant))


def _open_tfds(data, name: str, split: str) -> Source:
  return TFDS_DATASETS.get(name.partition("/")[0], _open_plain_tfds)(data, name, split)


def _open_plain_tfds(data, name: str, split: str) -> Source:
  from uae_jax.data.tfds_source import TFDSSource

  return TFDSSource(name, split, data.data_dir, fields=_fields(data))


def _fields(data) -> Fields:
  return Fields(data.image_field, data.caption_field, data.caption_choice)


def _open_stored_scenes(data, name: str, split: str) -> Source:
  from uae_jax.data.tfds_source import TFDSSource
  from uae_jax.small_world import source

  stored = TFDSSource(name, split, data.data_dir, extra=("scene",))
  more_held_out = [name for name in source.MORE_HELD_OUT if name in stored.splits]
  return source.StoredScenes(stored, source.stored_config(name, data.variant), more_held_out)


def has_held_out_files(data) -> bool:
  """Whether a source of files has a held-out split, whole or not."""
  _, _, name = data.source.partition(":")
  return "{split}" in name and any(map(_exists, _paths(data, name, HELD_OUT)))


def _paths(data, name: str, split: str) -> list[str]:
  """The paths or globs that may be the files of a split, in order of preference."""
  names = HELD_OUT_NAMES if split == HELD_OUT else (split,)
  folder = "" if is_in_cloud(name) else data.data_dir
  return [os.path.join(folder, name.replace("{split}", split_name)) for split_name in names]


def _exists(path: str) -> bool:
  return cloud_storage.exists(path) if is_in_cloud(path) else os.path.lexists(path) or bool(glob.glob(path))


def _open_files(kind: Callable[..., Source]) -> Callable[..., Source]:
  """Makes a function that opens files; `kind` makes the source from a path and `config.data`."""

  def open_files(data, name: str, split: str) -> Source:
    if split != "train" and "{split}" not in name:
      raise ValueError(f"data.source = {data.source!r} has no split {split}: put {{split}} into the path")
    paths = _paths(data, name, split)
    try:
      path = next(filter(_exists, paths), paths[0])
      source = kind(cloud_storage.fetched(path), data)
    except FileNotFoundError as error:
      raise ValueError(f"data.source = {data.source!r}: {path} does not exist") from error
    except (ValueError, OSError) as error:
      raise ValueError(f"data.source = {data.source!r}: {error}") from error
    if not len(source):
      raise ValueError(f"data.source = {data.source!r}: {path} holds no record")
    return source

  return open_files


# Kind of a part of a mixture -> defaults of the options that say nothing about it, but may about other parts.
UNUSED_FIELDS: dict[str, dict[str, str]] = {
  "folder": {"image_field": "", "caption_field": "", "caption_choice": FIRST},
  "prompts": {"image_field": ""},
}


def _open_mixture(data, name: str, split: str) -> Source:
  parts = mixture.parse(name)
  if split != "train":  # Parts without a held-out split are trained on only.
    held_out = [(weight, part) for weight, part in parts if "{split}" in part or part.startswith("tfds:")]
    parts = held_out or parts
  sources = []
  for _, part in parts:
    unused = UNUSED_FIELDS.get(part.partition(":")[0], {})
    source = open_source(dataclasses.replace(data, source=part, **unused), split)
    if not isinstance(source, Stored):
      raise ValueError(f"data.source = {data.source!r}: {part} stores no records and cannot be part of a mixture")
    sources.append(source)
  return Mixture(sources, [weight for weight, _ in parts], is_interleaved=split != "train")


# Prefix of `data.source` -> function (data, rest, split) -> source. A prefix with a colon requires a nonempty rest.
KINDS: dict[str, Callable[..., Source]] = {
  "scenes": _open_scenes,
  "tfds:": _open_tfds,
  "jsonl:": _open_files(lambda path, data: JsonLinesSource(path, _fields(data), data.index_dir)),
  "arrayrecord:": _open_files(lambda path, data: ArrayRecordSource(path, _fields(data))),
  "parquet:": _open_files(lambda path, data: ParquetSource(path, _fields(data))),
  "webdataset:": _open_files(lambda path, data: WebDatasetSource(path, _fields(data), data.index_dir)),
  "prompts:": _open_files(lambda path, data: PromptsSource(path, _fields(data), data.index_dir)),
  "mix:": _open_mixture,
  "folder:": _open_files(lambda path, data: FolderSource(path, data.index_dir)),
}
# TFDS datasets whose records have more than an image and a caption.
TFDS_DATASETS: dict[str, Callable[..., Source]] = {"uae_scenes": _open_stored_scenes}


def open_source(data, split: str) -> Source:
  """Opens the source named by `config.data.source`.

  Args:
    data: `config.data`, an object with `source`, `data_dir` and `variant`.
    split: one of `SPLITS`.

  Raises:
    ValueError: the source does not exist, is empty or damaged, or does not have the split.
  """
  if split not in SPLITS:
    raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
  kind, colon, name = data.source.partition(":")
  if kind + colon not in KINDS or bool(colon) != bool(name):
    raise ValueError(
      f"data.source = {data.source!r}: expected scenes, tfds:NAME, jsonl:PATH, arrayrecord:GLOB, parquet:GLOB, "
      "webdataset:GLOB, prompts:PATH, folder:PATH or mix:WEIGHT*SOURCE;WEIGHT*SOURCE"
    )
  return KINDS[kind + colon](data, name, split)
