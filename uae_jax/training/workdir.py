"""The folder of a run: its config, and the errors of a foreign or changed one."""

import json
from pathlib import Path

import ml_collections

CONFIG_FILE = "config.json"


def to_plain(config: ml_collections.ConfigDict) -> dict:
  """The config as JSON has it: dicts, lists, numbers, strings."""
  return json.loads(json.dumps(config.to_dict(), default=list))


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
  """`field: old -> new` for every field in which two configs differ."""
  found = []
  for name in sorted(set(old) | set(new)):
    before, after = old.get(name, "(absent)"), new.get(name, "(absent)")
    if isinstance(before, dict) and isinstance(after, dict):
      found += differences(before, after, f"{prefix}{name}.")
    elif before != after:
      found.append(f"config.{prefix}{name}: {before!r} -> {after!r}")
  return found


def open_workdir(workdir: Path, config: ml_collections.ConfigDict) -> dict:
  """Makes the folder of a new run, or checks that an existing one is this run's.

  Returns:
    The plain config.

  Raises:
    ValueError: the folder holds something else, or a run with another config.
  """
  workdir = Path(workdir)
  plain = to_plain(config)
  file = workdir / CONFIG_FILE
  if file.exists():
    changed = differences(read_config(workdir), plain)
    if changed:
      raise ValueError(
        f"{workdir} holds a run with another config ({'; '.join(changed[:5])}): "
        "use the old values to resume it, or another --workdir"
      )
    return plain
  if workdir.exists() and any(workdir.iterdir()):
    raise ValueError(
      f"{workdir} is not empty and holds no {CONFIG_FILE}: it is not a run of uae-jax, choose another --workdir"
    )
  workdir.mkdir(parents=True, exist_ok=True)
  # Written whole or not at all: a torn config would make the folder foreign.
  temporary = file.with_suffix(".tmp")
  temporary.write_text(json.dumps(plain, indent=2) + "\n")
  temporary.replace(file)
  return plain


def read_config(workdir: Path) -> dict:
  """The plain config of a run.

  Raises:
    FileNotFoundError: the folder holds no run.
    ValueError: its config cannot be read.
  """
  file = Path(workdir) / CONFIG_FILE
  if not file.exists():
    raise FileNotFoundError(f"{workdir} holds no {CONFIG_FILE}: it is not the workdir of a run")
  try:
    return json.loads(file.read_text())
  except json.JSONDecodeError as error:
    raise ValueError(f"{file} is damaged: {error}") from error
