"""The folder of a run: its config, what may change in it when the run is resumed, and a record of these changes."""

from collections.abc import Mapping
import datetime
from fnmatch import fnmatchcase
import json
from pathlib import Path
import shutil
from typing import Any

from absl import logging

from uae_jax.files import append_line, write_whole
from uae_jax.metrics_file import METRICS_FILE
from uae_jax.options import FRESH, STAGES, Experiment
from uae_jax.plain import from_plain
from uae_jax.plain import to_plain as plain_value
from uae_jax.training.lock import LOCK_FILE
from uae_jax.weights import legacy

CONFIG_FILE, CHANGES_FILE = "config.json", "config_changes.jsonl"
# Files that the next start makes from the config, if nothing is saved yet.
MADE_FROM_CONFIG = (
  "processor",
  "model.json",
  "data.json",
  "caption_lengths.json",
  "starts.jsonl",
  METRICS_FILE,
  CHANGES_FILE,
)

# Fields without an effect on what a run computes.
INERT_FIELDS = (
  "mesh.*",
  "checkpoints.*",
  "profile.*",
  "tensorboard",
  "metric_writers",
  "data.index_dir",
  "watchdog_seconds",
  "libtpu_init_args",
)
# Fields that may change when a run is resumed: also those that say how long it goes on and what it measures, and those
# that help if it fails. `docs/checkpoints.md` lists them for users.
FREE_FIELDS = (
  *INERT_FIELDS,
  "xla_flags",
  "max_skipped_in_a_row",
  "data.max_bad_fraction",
  "data.max_cut_fraction",
  "evaluation.*",
  "*.total_steps",
  "*.target_loss",
  "*.log_every_steps",
  "*.save_every_steps",
  "*.optimizer.learning_rate",
  "*.optimizer.clip_norm",
  "*.optimizer.spike_factor",
  "*.http_reward.*",
)
# Paths, which may be moved; a path that appears, vanishes or gives way to random numbers is another run.
MOVABLE_PATHS = ("processor", "init.*", "embedders.*", "data.source", "data.data_dir")


def to_plain(config: Experiment) -> dict:
  """Converts a config to the content of `config.json`: dicts, lists, numbers, strings, and a version number."""
  return {"config_version": legacy.CONFIG_VERSION} | plain_value(config)


def differences(old: Mapping, new: Mapping, prefix: str = "") -> dict[str, tuple[Any, Any]]:
  """Returns {dotted field: (old value, new value)} for every field in which two plain configs differ."""
  found: dict[str, tuple[Any, Any]] = {}
  for name in sorted({*old, *new}):
    before, after = old.get(name, "(absent)"), new.get(name, "(absent)")
    if isinstance(before, Mapping) and isinstance(after, Mapping):
      found |= differences(before, after, f"{prefix}{name}.")
    elif before != after:
      found[prefix + name] = before, after
  return found


def may_change(field: str, before: Any, after: Any, begun: set[str]) -> bool:
  """Whether a field may change when a run is resumed.

  Args:
    field: dotted field.
    before: old value.
    after: new value.
    begun: stages with a saved step; the section of any other stage may change.
  """
  section = field.partition(".")[0]
  if section in STAGES and section not in begun:
    return True
  if is_any(field, MOVABLE_PATHS):
    kinds = [str(value).partition(":")[0] if field == "data.source" else "" for value in (before, after)]
    return not {before, after} & {"", FRESH, "(absent)"} and kinds[0] == kinds[1]
  return is_any(field, FREE_FIELDS)


def is_any(field: str, patterns: tuple[str, ...]) -> bool:
  """Whether a dotted field matches one of the patterns."""
  return any(fnmatchcase(field, pattern) for pattern in patterns)


def saved_steps(workdir: Path) -> dict[str, int]:
  """Returns {folder of a stage: newest saved step}, without stages that have none."""
  steps: dict[str, int] = {}
  for step in Path(workdir).glob("checkpoints/*/*"):
    if step.name.isdigit():
      steps[step.parent.name] = max(int(step.name), steps.get(step.parent.name, 0))
  return steps


def stage_of(folder: str) -> str:
  """The stage of a folder `<stage>` or `<stage>_round<k>`."""
  return folder.rpartition("_round")[0] or folder


def check_workdir(workdir: Path, config: Experiment) -> dict[str, tuple[Any, Any]]:
  """Checks that a run with this config may start or go on in a folder, without writing anything.

  Returns:
    Differences to the config of the run that is there; empty for a new run.

  Raises:
    ValueError: the folder contains something else, or a run of which a saved step forbids the change of a field.
  """
  workdir = Path(workdir)
  if workdir.exists() and not workdir.is_dir():
    raise ValueError(f"--workdir={workdir} is a file: expected a folder")
  saved = saved_steps(workdir)
  if not (workdir / CONFIG_FILE).exists():
    if workdir.exists() and any(not is_ours(other) for other in workdir.iterdir()):
      raise ValueError(
        f"{workdir} is not empty and holds no {CONFIG_FILE}: it is not a run of uae-jax, choose another --workdir"
      )
    return {}
  try:
    old = read_config(workdir)
  except ValueError:
    if saved:
      raise
    return {"": ("(unreadable)", "")}  # The first start was cut short: nothing is lost.
  plain = to_plain(config)
  if saved:
    legacy.refuse_old(old, workdir)
  changed = differences(with_defaults(old), plain)
  if not saved:
    return changed
  begun = {stage_of(folder) for folder in saved}
  refused = [field for field, values in changed.items() if not may_change(field, *values, begun)]
  if refused:
    shown = [f"config.{field}: {changed[field][0]!r} -> {changed[field][1]!r}" for field in refused[:5]]
    more = f" and {len(refused) - 5} more" if len(refused) > 5 else ""
    raise ValueError(
      f"{workdir} holds a run with saved steps, in which these fields cannot change ({'; '.join(shown)}{more}): "
      f"use the old values to resume it, or another --workdir with --config.init.checkpoint={workdir}"
    )
  for folder, step in saved.items():
    total_steps = plain.get(stage_of(folder), {}).get("total_steps", step)
    if total_steps < step:
      field = f"config.{stage_of(folder)}.total_steps"
      raise ValueError(f"{field} = {total_steps}, but {workdir} holds step {step} of {folder}: expected {step} or more")
  return changed


def with_defaults(plain: Mapping) -> Mapping:
  """Adds the defaults of fields that did not exist yet when a config was written."""
  try:
    fields = {name: value for name, value in plain.items() if name != "config_version"}
    return {"config_version": plain["config_version"]} | plain_value(from_plain(Experiment, fields, "config"))
  except (ValueError, KeyError):
    return plain


def is_ours(file: Path) -> bool:
  """Whether a file in a folder without config is what a start that was cut short leaves."""
  return file.suffix in (".tmp", ".lock", ".gone") or file.name == LOCK_FILE


def open_workdir(workdir: Path, config: Experiment) -> dict:
  """Creates the folder of a new run, or records what changed in the config of the run that is there.

  A run without a saved step begins again with the new config.

  Returns:
    The plain config.

  Raises:
    ValueError: see `check_workdir`.
  """
  workdir, plain = Path(workdir), to_plain(config)
  changed = check_workdir(workdir, config)
  workdir.mkdir(parents=True, exist_ok=True)
  saved = saved_steps(workdir)
  if changed and not saved:
    for name in MADE_FROM_CONFIG:
      path = workdir / name
      shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
  elif changed:
    record_changes(workdir, config, changed, saved)
  if read_json(workdir / CONFIG_FILE) != plain:
    write_whole(workdir / CONFIG_FILE, json.dumps(plain, indent=2) + "\n")
  return plain


def record_changes(workdir: Path, config: Experiment, changed: Mapping, saved: Mapping[str, int]) -> None:
  """Appends the changes of a config to `config_changes.jsonl`, with the stage and step after which they hold."""
  folders = [folder for folder, _ in config.runs if folder in saved]
  folder = folders[-1] if folders else max(saved)
  finished = {
    stage_of(name) for name in saved if (workdir / "checkpoints" / name / str(saved[name]) / "params").exists()
  }
  for field, (before, after) in changed.items():
    if field.partition(".")[0] in finished:
      logging.warning("config.%s: %r -> %r does nothing, since this stage is finished", field, before, after)
    else:
      logging.info("config.%s: %r -> %r from step %d of %s", field, before, after, saved[folder], folder)
  record = {
    "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    "stage": folder,
    "step": saved[folder],
    "changes": {field: list(values) for field, values in changed.items()},
  }
  append_line(workdir / CHANGES_FILE, json.dumps(record))


def read_config(workdir: Path) -> dict:
  """Reads the plain config of a run; if its file is damaged, the copy in the newest saved step.

  Raises:
    FileNotFoundError: the folder does not contain a run.
    ValueError: the config cannot be read.
  """
  file = Path(workdir) / CONFIG_FILE
  if not file.exists():
    raise FileNotFoundError(f"{workdir} holds no {CONFIG_FILE}: it is not the workdir of a run")
  content = read_json(file)
  if content is not None:
    return content
  for copy in sorted(file.parent.glob("checkpoints/*/*/config/metadata"), key=lambda path: -path.stat().st_mtime):
    content = read_json(copy)
    if content is not None:
      logging.warning("%s is damaged: using the copy of %s", file, copy.parent.parent)
      return content
  raise ValueError(f"{file} is damaged: it is not a JSON object, and no saved step holds a copy")


def read_json(file: Path) -> dict | None:
  """Reads a JSON object; None if the file does not exist or contains anything else."""
  try:
    content = json.loads(file.read_bytes())
  except (FileNotFoundError, ValueError, RecursionError):
    return None
  return content if isinstance(content, dict) else None
