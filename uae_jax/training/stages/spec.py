"""Interface of a stage to training, evaluation and planning: the `SPEC` that each stage file defines."""

from collections.abc import Callable
import dataclasses
import importlib
from typing import Any

import jax
import optax

from uae_jax.options import Experiment
from uae_jax.training.build import Built
from uae_jax.training.rl.phases import Phases
from uae_jax.training.supervised import LossFunction


def no_embedders(options: Any) -> dict[str, str]:
  del options
  return {}


def identity(built: Built, params: dict, images: jax.Array) -> dict:
  """Returns the parameters unchanged; the default `finish` of a stage."""
  del built, images
  return params


@dataclasses.dataclass(frozen=True)
class StageSpec:
  """Definition of a stage; exactly one of `make_loss` and `make_phases` is set.

  Attributes:
    figures: (evaluator, folder or None, params, params before the stage or None) -> held-out metrics; the evaluator is
      an `evaluation.evaluator.StageEvaluator`. Without a folder no file is written.
    make_loss: (config, built) -> loss of a supervised stage.
    make_phases: (config, built, optimizer) -> phases of an RL stage.
    embedders: section.options -> {field of the options: embedder named there}.
    extra_params: (built, key) -> parameters that exist only while the stage trains; None for none.
    finish: (built, params, images uint8[B, H, W, 3]) -> parameters that the next stage starts from.
    compares_before: whether the metrics compare with the parameters from before the stage.
    observes_captions: whether held-out images are captioned while the stage trains.
    runs_suites: whether the captioner captions and the decoder generates, so that `evaluation.suites` mean something.
    samples_captions: section.options -> captions sampled per row of the batch.
    needs_captions: section.options -> whether the stage trains on the captions of the data.
    generates_by_captioner: the kind of system that the stage trains, see `models.system.SystemConfig`; None for any.
  """

  figures: Callable[[Any, str, dict, dict | None], dict]
  make_loss: Callable[[Experiment, Built], LossFunction] | None = None
  make_phases: Callable[[Experiment, Built, optax.GradientTransformation], Phases] | None = None
  embedders: Callable[[Any], dict[str, str]] = no_embedders
  extra_params: Callable[[Built, jax.Array], dict] | None = None
  finish: Callable[[Built, dict, jax.Array], dict] = identity
  compares_before: bool = False
  observes_captions: bool = False
  runs_suites: bool = False
  samples_captions: Callable[[Any], int] = lambda options: 0
  needs_captions: Callable[[Any], bool] = lambda options: True
  generates_by_captioner: bool | None = None


def find(name: str) -> StageSpec:
  """Returns the `SPEC` of `training/stages/<name>.py`."""
  return importlib.import_module(f"uae_jax.training.stages.{name}").SPEC
