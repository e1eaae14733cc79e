"""Converts any stored source to ArrayRecord shards with the bytes of its image files.

Every shard is read back before it counts. A conversion that is interrupted leaves its finished shards in a hidden
folder, from which the same command goes on; the target appears when everything is there.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
import contextlib
import dataclasses
import fcntl
import json
import os
from pathlib import Path
from typing import Any
import zlib

import numpy as np
from tqdm import tqdm

from uae_jax.data import records
from uae_jax.data.bad_records import describe
from uae_jax.data.images import image_from_bytes
from uae_jax.data.sources import HELD_OUT, HELD_OUT_NAMES, KeepsFiles, Stored, has_held_out_files, open_source
from uae_jax.files import image_bytes, require_regular, shown, write_whole
from uae_jax.options import DataOptions
from uae_jax.options.data import RANDOM
from uae_jax.options.mixture import MIXTURE

PLAN_FILE, LOCK_FILE = "conversion.json", "lock"
NUM_NAMED = 20


@dataclasses.dataclass(frozen=True)
class Converted:
  """What a conversion wrote: split -> number of records, and the records that were left out, `KEY (reason)`."""

  counts: dict[str, int]
  bad: list[str]


def convert(data: DataOptions, target: Path, *, records_per_shard: int, num_threads: int) -> Converted:
  """Converts the training split and, if there is one, the held-out split to `target/SPLIT-I-of-N.array_record`.

  Args:
    data: source, names of fields, and `max_bad_fraction`, the largest fraction of unreadable records per split.
    target: absent, or an empty folder.
    records_per_shard: number of records of the source per shard.
    num_threads: shards that are written at the same time.

  Raises:
    ValueError: the source cannot be read, has no images, or has too many unreadable records; no target is left.
  """
  target = Path(target).absolute()
  if target.exists() and not (target.is_dir() and not any(target.iterdir())):
    raise ValueError(f"{target} exists and is not an empty folder: nothing is overwritten, choose another --out")
  if not data.has_images:
    raise ValueError(f"data.source = {data.source!r} has no images, so that there is nothing to convert")
  sources = _open(data)
  plan = {
    "source": data.source,
    "fields": [data.image_field, data.caption_field],
    "records_per_shard": records_per_shard,
    "splits": {split: source.fingerprint() for split, source in sources.items()},
  }
  partial = target.parent / f".{target.name}.converting"
  partial.mkdir(parents=True, exist_ok=True)
  with open(partial / LOCK_FILE, "a") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ValueError(f"another process is converting to {target}: wait for it, or choose another --out") from error
    done = _write(sources, plan, partial, data.max_bad_fraction, num_threads)
    if target.exists():
      target.rmdir()
    (partial / LOCK_FILE).unlink()
    partial.rename(target)
  return done


def _write(
  sources: dict[str, Stored], plan: dict[str, Any], partial: Path, max_bad_fraction: float, num_threads: int
) -> Converted:
  """Writes what is missing of a conversion into its hidden folder."""
  if _read(partial / PLAN_FILE) != plan:
    # Other data or other options: nothing that is there can be used.
    for file in partial.iterdir():
      if file.name != LOCK_FILE:
        file.unlink()
    write_whole(partial / PLAN_FILE, json.dumps(plan, indent=2) + "\n")
  counts, bad = {}, []
  for split, source in sources.items():
    found = _write_split(source, split, partial, plan["records_per_shard"], num_threads)
    counts[split], left_out = sum(count for count, _ in found), [line for _, lines in found for line in lines]
    if len(left_out) > max_bad_fraction * len(source) or not counts[split]:
      for file in partial.glob("*.done"):
        if (_read(file) or ["", ""])[1]:
          file.unlink()  # These records are read again, since they may be repaired by then.
      raise ValueError(
        f"{len(left_out)} of {len(source)} records of split {split} are unreadable, more than max_bad_fraction = "
        f"{max_bad_fraction}; the first one: {left_out[0]}. Repair or remove them, or raise --max-bad-fraction"
      )
    bad += left_out
  for file in partial.glob("*.done"):
    file.unlink()
  write_whole(partial / PLAN_FILE, json.dumps({**plan, "records": counts, "left_out": bad}, indent=2) + "\n")
  return Converted(counts, bad)


def _open(data: DataOptions) -> dict[str, Stored]:
  # All captions of a record are kept, whichever the run that reads them chooses.
  kind = data.source.partition(":")[0]
  opened = data if kind in ("scenes", "folder") else dataclasses.replace(data, caption_choice=RANDOM)
  sources = {"train": open_source(opened, "train")}
  if kind == MIXTURE:
    has_held_out = "{split}" in data.source
  elif kind == "tfds":
    has_held_out = any(name in getattr(sources["train"], "splits", ()) for name in HELD_OUT_NAMES)
  else:
    has_held_out = has_held_out_files(data)
  if has_held_out:
    sources[HELD_OUT] = open_source(opened, HELD_OUT)
  found = {split: source for split, source in sources.items() if isinstance(source, Stored)}
  if not found:
    raise ValueError(f"data.source = {data.source!r} stores no records, so that there is nothing to convert")
  return found


def _write_split(
  source: Stored, split: str, folder: Path, records_per_shard: int, num_threads: int
) -> list[tuple[int, list[str]]]:
  """Writes the shards of a split that are missing; returns (number of records, records left out) of each."""
  num_shards = -(-len(source) // records_per_shard)
  progress = tqdm(total=len(source), desc=split, unit="record")

  def shard(i: int) -> tuple[int, list[str]]:
    indices = range(i * records_per_shard, min((i + 1) * records_per_shard, len(source)))
    path = folder / f"{split}-{i:05d}-of-{num_shards:05d}.array_record"
    done = path.with_suffix(".done")
    found = _read(done)
    if found is None or not path.exists():
      found = _write_shard(source, indices, path)
      write_whole(done, json.dumps(found))
    progress.update(len(indices))
    return found[0], found[1]

  with progress, ThreadPoolExecutor(num_threads) as pool:
    return list(pool.map(shard, range(num_shards)))


def _write_shard(source: Stored, indices: Sequence[int], path: Path) -> tuple[int, list[str]]:
  """Writes one shard and reads it back.

  Raises:
    OSError: the file cannot be written.
    ValueError: it does not contain what was written.
  """
  from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

  path.unlink(missing_ok=True)
  # One record per group, so that it can be read alone.
  writer = ArrayRecordWriter(str(path), "group_size:1")
  checksums, bad = [], []
  for index in indices:
    try:
      packed = _packed(source, index)
    except Exception as error:  # A damaged file can raise anything.
      bad.append(f"{shown(source.key(index))} ({describe(error)})")
      continue
    with _one_type(path):
      writer.write(packed)
    checksums.append(zlib.crc32(packed))
  with _one_type(path):
    writer.close()
  if not checksums:
    path.unlink()
    return 0, bad
  reader = ArrayRecordReader(str(path))
  found = [zlib.crc32(reader.read()) for _ in range(reader.num_records())]
  reader.close()
  if found != checksums:
    raise ValueError(f"{path} does not contain what was written to it: check the disk")
  with open(path, "rb") as file:
    os.fsync(file.fileno())
  return len(checksums), bad


@contextlib.contextmanager
def _one_type(path: Path) -> Iterator[None]:
  """Context in which errors of ArrayRecord's writer, for instance on a full disk, are those of other files."""
  try:
    yield
  except RuntimeError as error:
    raise OSError(f"{path} could not be written ({error})") from error


def _packed(source: Stored, index: int) -> bytes:
  """The record of a source with its image as it is in its file; without one, as a PNG."""
  if isinstance(source, KeepsFiles):
    content, captions = source.content(index)
    if isinstance(content, Path):
      require_regular(content)
      content = content.read_bytes()
    image_from_bytes(content, "the image")  # Raises if it cannot be decoded.
  else:
    record = source[index]
    captions = record.get("captions") or ((record["caption"],) if record["caption"] else ())
    content = image_bytes(np.asarray(record["image"]))
  named: dict[str, Any] = {"caption": captions[0]} if len(captions) == 1 else {"captions": list(captions)}
  return records.pack(named if captions else {}, content)


def _read(file: Path) -> Any:
  """The content of a JSON file; None if it cannot be read."""
  try:
    return json.loads(file.read_bytes())
  except (OSError, ValueError):
    return None
