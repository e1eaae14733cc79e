"""Further writers of a run's metrics: Weights & Biases, and any writer with the methods of clu's `MetricWriter`."""

from collections.abc import Mapping
import hashlib
import importlib
from pathlib import Path
from typing import Any

WANDB = "wandb"


def make(name: str, workdir: Path, config: dict) -> Any:
  """Makes a writer with the methods write_scalars, write_images, write_texts, flush and close of clu's `MetricWriter`.

  Args:
    name: "wandb", or MODULE:FUNCTION; the function is called with `workdir` and `config`.
    workdir: folder of the run.
    config: plain config of the run.

  Raises:
    ValueError: there is no such writer; the message names the remedy.
  """
  if name == WANDB:
    return WandbWriter(workdir, config)
  module, _, function = name.partition(":")
  try:
    return getattr(importlib.import_module(module), function)(workdir, config)
  except (ImportError, AttributeError) as error:
    raise ValueError(f"config.metric_writers names {name!r}, which cannot be imported: {error}") from error


class WandbWriter:
  """Writes to a run of Weights & Biases, to the same one after a restart.

  Project and account are those of its environment (WANDB_PROJECT, WANDB_API_KEY, WANDB_MODE). Each stage has an x axis
  of its own, `<stage>/step`.
  """

  def __init__(self, workdir: Path, config: dict):
    try:
      import wandb
    except ImportError as error:
      raise ValueError("config.metric_writers names 'wandb': pip install 'uae_jax[wandb]'") from error
    self._wandb = wandb
    path = str(workdir.absolute())
    self._run = wandb.init(
      id=hashlib.sha256(path.encode()).hexdigest()[:16], resume="allow", name=workdir.name, dir=path, config=config
    )
    self._stages: set[str] = set()

  def _log(self, step: int, values: Mapping[str, Any]) -> None:
    for stage in {name.partition("/")[0] for name in values} - self._stages:
      self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
      self._stages.add(stage)
    self._run.log({**values, **{f"{name.partition('/')[0]}/step": step for name in values}})

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    self._log(step, scalars)

  def write_images(self, step: int, images: Mapping[str, Any]) -> None:
    self._log(step, {name: [self._wandb.Image(image) for image in batch] for name, batch in images.items()})

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    self._log(step, {name: self._wandb.Html(text, inject=False) for name, text in texts.items()})

  def flush(self) -> None:
    """Nothing to do: its own process uploads."""

  def close(self) -> None:
    self._run.finish()
