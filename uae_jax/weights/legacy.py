"""Reads files from before version 2 of the config, when models, stages and fields had other names.

Only this module uses the old names, and only for reading.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIG_VERSION = 2
EXPORT_FORMAT, OLD_EXPORT_FORMAT = "uae_jax checkpoint 2", "uae_jax checkpoint 1"

# Names at the root of a tree of parameters, and stages of a run: old -> new.
NETS = {"autoencoder": "vae", "encoders": "embedders"}
STAGES = {"autoencoder": "vae"}
# Fields of configs and of model sizes, at any depth: old -> new.
FIELDS = NETS | {"held_out_encoder": "held_out_embedder", "image_size": "image_px"}


# --- Trees of parameters ---------------------------------------------------------------------------------------------


def tree_from_disk(tree: Mapping) -> dict:
  """Renames the top level of a tree to current names; an inner `encoder` belongs to the VAE and stays."""
  return {NETS.get(name, name): branch for name, branch in tree.items()}


def tree_as_on_disk(tree: Mapping, on_disk: Mapping) -> dict:
  """Renames the top level of a tree to the names in `on_disk`; the inverse of `tree_from_disk`."""
  old = {new: name for name, new in NETS.items() if name in on_disk}
  return {old.get(name, name): branch for name, branch in tree.items()}


def path_from_disk(path: str) -> str:
  """The current path of a leaf, such as `vae/encoder/...` for `autoencoder/encoder/...`."""
  net, *rest = path.split("/")
  return "/".join((NETS.get(net, net), *rest))


# --- Plain configs ---------------------------------------------------------------------------------------------------


def is_old_config(plain: Mapping) -> bool:
  """Whether a `config.json` was written before configs had a version."""
  return "config_version" not in plain


# Fields of an old run's config that inference and reports need; the options of its stages had other fields.
KEPT = ("seed", "model", "processor", "dtype", "data", "rounds", "embedders", "evaluation")


def current_config(plain: Mapping) -> dict:
  """Converts a run's config to current names; a config that has a version is returned unchanged.

  From an old config it keeps only what is needed to use the result, so such a run cannot be resumed.
  """
  if not is_old_config(plain):
    return dict(plain)
  old = current_fields(plain)
  config: dict[str, Any] = {name: old[name] for name in KEPT if name in old}
  config["stages"] = [STAGES.get(name, name) for name in old.get("stages", [])]
  for name in config["stages"]:
    budget = old.get(name, {}).get("options", {}).get("max_new_tokens")
    if budget is not None:
      config[name] = {"options": {"max_new_tokens": budget}}
  return config | {"config_version": CONFIG_VERSION}


def current_fields(plain: Any) -> Any:
  """Renames all fields of nested plain values to current names."""
  if isinstance(plain, Mapping):
    return {FIELDS.get(name, name): current_fields(value) for name, value in plain.items()}
  return [current_fields(value) for value in plain] if isinstance(plain, list) else plain


def refuse_old(plain: Mapping, workdir: Path) -> None:
  """Refuses to resume a run of an earlier version.

  Args:
    plain: content of the run's `config.json`.
    workdir: working directory of the run, for the message.

  Raises:
    ValueError: the config has no version or another one; the message says what still works.
  """
  version = plain.get("config_version")
  if version != CONFIG_VERSION:
    found = "no config_version" if version is None else f"config_version = {version}"
    raise ValueError(
      f"{workdir}/config.json has {found}, expected {CONFIG_VERSION}: options and parameters had other names, so this "
      f"run cannot be resumed; start another --workdir with --config.init.checkpoint={workdir}:STAGE "
      f"(--model={workdir} and uae-jax report still read it)"
    )


# --- Folders of stages -----------------------------------------------------------------------------------------------


def stage(name: str) -> str:
  """The current name of a stage."""
  return STAGES.get(name, name)


def stage_folder(checkpoints: Path, name: str) -> Path:
  """The folder of a stage's checkpoints, under its current or its old name."""
  old = {new: old for old, new in STAGES.items()}.get(name, name)
  has_only_old = not (checkpoints / name).exists() and (checkpoints / old).exists()
  return checkpoints / (old if has_only_old else name)


# --- Exports ---------------------------------------------------------------------------------------------------------


def current_export(content: Mapping, file: Path) -> dict:
  """Converts the `uae.json` of a native checkpoint to the current format.

  Raises:
    ValueError: the format is unknown.
  """
  if content.get("format") == OLD_EXPORT_FORMAT:
    dtypes = {path_from_disk(path): dtype for path, dtype in content["dtypes"].items()}
    return dict(content) | {"format": EXPORT_FORMAT, "config": current_fields(content["config"]), "dtypes": dtypes}
  if content.get("format") != EXPORT_FORMAT:
    raise ValueError(f"{file}: format {content.get('format')!r}, expected {EXPORT_FORMAT!r} or {OLD_EXPORT_FORMAT!r}")
  return dict(content)
