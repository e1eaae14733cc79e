"""The folder of a run: writes its config, and refuses to resume a run with another config."""

import json
from pathlib import Path

from uae_jax.files import write_whole
from uae_jax.options import Experiment
from uae_jax.plain import to_plain as plain_value
from uae_jax.weights import legacy

CONFIG_FILE = "config.json"
# Fields that may change when a run is resumed: they affect where it runs and what it writes, not what it computes.
FREE_FIELDS = (
  *("mesh", "checkpoints", "profile", "tensorboard"),
  *("metric_writers", "watchdog_seconds", "libtpu_init_args"),
)


def to_plain(config: Experiment) -> dict:
  """Converts a config to the content of `config.json`: dicts, lists, numbers, strings, and a version number."""
  return {"config_version": legacy.CONFIG_VERSION} | plain_value(config)


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
  """Lists "config.field: old -> new" for every field in which two configs differ."""
  found = []
  for name in sorted(set(old) | set(new)):
    before, after = old.get(name, "(absent)"), new.get(name, "(absent)")
    if isinstance(before, dict) and isinstance(after, dict):
      found += differences(before, after, f"{prefix}{name}.")
    elif before != after:
      found.append(f"config.{prefix}{name}: {before!r} -> {after!r}")
  return found


def open_workdir(workdir: Path, config: Experiment) -> dict:
  """Creates the folder of a new run, or checks that an existing one belongs to this run.

  `FREE_FIELDS` may differ, e.g. to resume a run on another mesh; `config.json` is then updated.

  Returns:
    The plain config.

  Raises:
    ValueError: the folder contains something else, or a run with another config.
  """
  workdir = Path(workdir)
  plain = to_plain(config)
  file = workdir / CONFIG_FILE
  if file.exists():
    old = read_config(workdir)
    legacy.refuse_old(old, workdir)
    changed = differences(fixed(old), fixed(plain))
    if changed:
      raise ValueError(
        f"{workdir} holds a run with another config ({'; '.join(changed[:5])}): "
        "use the old values to resume it, or another --workdir"
      )
    if old != plain:
      write_whole(file, json.dumps(plain, indent=2) + "\n")
    return plain
  # A run that was killed while writing its config leaves only a temporary file.
  if workdir.exists() and any(other.suffix != ".tmp" for other in workdir.iterdir()):
    raise ValueError(
      f"{workdir} is not empty and holds no {CONFIG_FILE}: it is not a run of uae-jax, choose another --workdir"
    )
  workdir.mkdir(parents=True, exist_ok=True)
  write_whole(file, json.dumps(plain, indent=2) + "\n")
  return plain


def fixed(plain: dict) -> dict:
  """Returns the part of a plain config that must not change when a run is resumed."""
  return {name: value for name, value in plain.items() if name not in FREE_FIELDS}


def read_config(workdir: Path) -> dict:
  """Reads the plain config of a run.

  Raises:
    FileNotFoundError: the folder does not contain a run.
    ValueError: the config cannot be read.
  """
  file = Path(workdir) / CONFIG_FILE
  if not file.exists():
    raise FileNotFoundError(f"{workdir} holds no {CONFIG_FILE}: it is not the workdir of a run")
  try:
    return json.loads(file.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f"{file} is damaged: {error}") from error
