"""Checks the data before a run trains: readable, with captions where they are needed, and the same as before."""

from collections.abc import Callable, Mapping
import json
from pathlib import Path
from typing import Any

from absl import logging
import numpy as np

from uae_jax.data.bad_records import describe
from uae_jax.data.records import CAPTION_FIELDS
from uae_jax.data.sources import Source, Stored, open_source
from uae_jax.files import shown, write_whole
from uae_jax.options import Experiment
from uae_jax.training.restore import finished_steps
from uae_jax.training.stages import spec

# In the workdir: the fingerprint of each split that the run uses.
DATA_FILE = "data.json"
ACCEPT = "--accept_changed_data"
# Sizes of the samples of whole records, and of captions alone, which are read faster.
NUM_RECORDS, NUM_CAPTIONS = 16, 256


def check_data(config: Experiment, workdir: Path, *, accepts_changes: bool = False) -> dict[str, dict]:
  """Checks the data of a run that is not finished; writes nothing.

  Args:
    config: config of the run.
    workdir: folder of the run, which may not exist yet.
    accepts_changes: go on although the data changed since the last start.

  Returns:
    split -> fingerprint, for `write_fingerprints`; empty if nothing is stored, or nothing is left to train.

  Raises:
    ValueError: no record can be read, a stage needs captions and there are none, or the data changed since the last
      start; the message names the source.
  """
  checkpoints = Path(workdir) / "checkpoints"
  stages = [name for folder, name in config.runs if not finished_steps(checkpoints / folder)]
  if not stages:
    return {}
  splits = ("train", "held_out") if config.evaluation.num_images else ("train",)
  opened = {split: open_source(config.data, split) for split in splits}
  sources = {split: source for split, source in opened.items() if isinstance(source, Stored)}
  fingerprints = {split: source.fingerprint() for split, source in sources.items()}
  if any(step.name.isdigit() for step in checkpoints.glob("*/*")):
    check_unchanged(read_fingerprints(workdir), fingerprints, config.data.source, accepts_changes=accepts_changes)
  for split, source in sources.items():
    check_readable(source, f"data.source = {config.data.source!r} ({split})")
  needing = [name for name in stages if spec.find(name).needs_captions(config.section(name).options)]
  if needing and "train" in sources:
    check_captions(sources["train"], f"data.source = {config.data.source!r}", needing[0])
  return fingerprints


def check_readable(source: Source, where: str) -> None:
  """Checks that some record of a sample can be read.

  Raises:
    ValueError: none can be read.
  """
  records, errors = sample(source, source.__getitem__, NUM_RECORDS)
  if not records:
    raise ValueError(f"{where}: none of {len(errors)} records that were looked at can be read, such as {errors[0]}")


def check_captions(source: Stored, where: str, stage: str) -> None:
  """Checks that some record of a sample has a caption.

  Raises:
    ValueError: none has one.
  """
  captions, errors = sample(source, source.caption, NUM_CAPTIONS)
  if any(captions):
    return
  fields = source.fields()
  expected = f"expected one in a field {', '.join(CAPTION_FIELDS)}; records have {', '.join(fields)}" if fields else ""
  reason = errors[0] if errors else expected or "expected one beside each image, in a .txt file of the same name"
  raise ValueError(
    f"{stage} trains on captions, but none of {len(captions) + len(errors)} records of {where} that were looked at "
    f"has one: {reason}"
  )


def sample(source: Source, read: Callable[[int], Any], count: int) -> tuple[list, list[str]]:
  """Reads evenly spaced records, all of them if there are no more than `count`.

  Returns:
    (values of `read` for the records that can be read, one message for each of the others).
  """
  values, errors = [], []
  for index in np.unique(np.linspace(0, len(source) - 1, count).astype(int)).tolist():
    try:
      values.append(read(index))
    except Exception as error:  # A damaged file can raise anything.
      errors.append(f"{shown(source.key(index))} ({describe(error)})")
  return values, errors


# --- Changes between two starts ---------------------------------------------------------------------------------------


def check_unchanged(before: Mapping, now: Mapping, source: str, *, accepts_changes: bool) -> None:
  """Checks that the data have the fingerprints of the last start; if changes are accepted, only names them.

  Raises:
    ValueError: they differ.
  """
  changes = [
    f"{split}: {name} {before[split].get(name)} -> {now[split].get(name)}"
    for split in sorted(set(before) & set(now))
    for name in {**before[split], **now[split]}
    if before[split].get(name) != now[split].get(name)
  ]
  if not changes:
    return
  message = f"data.source = {source!r} is not what this run was trained on ({'; '.join(changes)})"
  if not accepts_changes:
    raise ValueError(
      f"{message}: put the old data back, or continue on the new data with {ACCEPT}; the order of records begins "
      "anew within the epoch, so that some occur twice in it and others never"
    )
  logging.warning("%s; continuing, because of %s", message, ACCEPT)


def write_fingerprints(workdir: Path, fingerprints: Mapping) -> None:
  """Writes the fingerprints of the splits to the workdir, if they differ from those there."""
  merged = {**read_fingerprints(workdir), **fingerprints}
  if merged != read_fingerprints(workdir):
    write_whole(Path(workdir) / DATA_FILE, json.dumps(merged, indent=2) + "\n")


def read_fingerprints(workdir: Path) -> dict[str, dict]:
  """Reads the fingerprints of the last start; empty if there are none, or if the file is damaged."""
  try:
    found = json.loads((Path(workdir) / DATA_FILE).read_bytes())
  except (FileNotFoundError, ValueError, RecursionError):
    return {}
  splits = found.items() if isinstance(found, dict) else ()
  return {split: values for split, values in splits if isinstance(values, dict)}
