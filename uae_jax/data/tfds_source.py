"""A TFDS dataset that is prepared as ArrayRecord, as a source of records."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from uae_jax.data import records
from uae_jax.data.file_sources import num_records
from uae_jax.data.images import from_array
from uae_jax.data.records import DEFAULT_FIELDS, Fields
from uae_jax.data.sources import HELD_OUT, HELD_OUT_NAMES
from uae_jax.options.data import FIRST

IMAGE = "image"


class TFDSSource:
  """A prepared TFDS dataset, read by grain's ArrayRecord reader.

  Args:
    name: name of the dataset with its config, such as uae_scenes/plain.
    split: name of the split; for the held-out one, the first of `HELD_OUT_NAMES` that the dataset has.
    data_dir: folder of TFDS datasets; "" uses the default of TFDS.
    fields: names of the features of image and captions.
    extra: names of further features to include in records.

  Raises:
    ValueError: there is no such dataset or split, it has no image, or its files cannot be read.
  """

  def __init__(
    self, name: str, split: str, data_dir: str, *, fields: Fields = DEFAULT_FIELDS, extra: Sequence[str] = ()
  ):
    import tensorflow_datasets as tfds

    where = f"data.source = tfds:{name}"
    missing = f"{where}: no such dataset in data.data_dir = {data_dir!r}"
    try:
      builder = tfds.builder(name, data_dir=data_dir or None)
    except Exception as error:  # The exception type depends on whether TFDS knows the name.
      raise ValueError(missing) from error
    if not builder.info.splits:
      raise ValueError(missing)
    names = HELD_OUT_NAMES if split == HELD_OUT else (split,)
    found = next((name for name in names if name in builder.info.splits), None)
    if found is None:
      raise ValueError(f"{where}: no split {split}, only {', '.join(builder.info.splits)}")
    self._features = tuple(builder.info.features)
    self._fields = dataclasses.replace(fields, image=fields.image or IMAGE)
    for feature in filter(None, (self._fields.image, self._fields.caption, *extra)):
      if feature not in self._features:
        raise ValueError(f"{where}: no feature {feature!r}, only {', '.join(self._features)}")
    self._name, self._extra = f"{name} {found}", tuple(extra)
    self.splits, self._split = tuple(builder.info.splits), builder.info.splits[found]
    self._version = str(builder.info.version)
    if not self._split.num_examples:
      raise ValueError(f"{where}: split {found} in {builder.data_dir} holds no record")
    try:
      self._data = builder.as_data_source(split=found)
    except NotImplementedError as error:  # Another file format.
      reason = " ".join(str(error).split())[:200]
      raise ValueError(f"{where}: prepare it again with file_format='array_record' ({reason})") from error
    # TFDS itself looks at a file only when a record of it is read.
    try:
      counts = num_records([str(path) for path in self._split.filepaths])
    except (ValueError, OSError) as error:
      raise ValueError(f"{where}: {error}") from error
    if counts != list(self._split.shard_lengths):
      raise ValueError(
        f"{where}: files of split {found} in {builder.data_dir} have {sum(counts)} records, expected "
        f"{self._split.num_examples}: prepare it again"
      )

  def __len__(self) -> int:
    return len(self._data)

  def __getitem__(self, index: int) -> dict:
    example = self._data[index]
    record = {"image": np.asarray(from_array(example[self._fields.image])), **_captions(example, self._fields)}
    return record | {name: np.asarray(example[name]) for name in self._extra}

  def caption(self, index: int) -> str:
    return caption_of(self._data[index], self._fields)

  def key(self, index: int) -> str:
    return f"{self._name} record {index}"

  def fields(self) -> Sequence[str]:
    return self._features

  def fingerprint(self) -> dict[str, int | str]:
    return {"version": self._version, "records": len(self), "bytes": int(self._split.num_bytes)}


def caption_of(example: Mapping[str, Any], fields: Fields = DEFAULT_FIELDS) -> str:
  """Returns the caption of a TFDS example by the rule of `records.caption_of`; features named `text` may be nested."""
  return _captions(example, fields)["caption"]


def _captions(example: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
  names = (fields.caption,) if fields.caption else records.CAPTION_FIELDS
  count = 1 if fields.choice == FIRST else None
  plain = {name: _plain(example[name], count) for name in names if name in example}
  return records.chosen(records.captions_of(plain, fields), fields)


def _plain(value: Any, count: int | None) -> Any:
  """Converts the value of a feature, of a list the first `count`, to what it would be in JSON."""
  if isinstance(value, Mapping) and "text" in value:
    value = value["text"]
  if isinstance(value, np.ndarray | np.generic):
    value = value.tolist()
  if isinstance(value, list | tuple):
    return [_plain(item, count) for item in value[:count]]
  return value.decode() if isinstance(value, bytes) else value
