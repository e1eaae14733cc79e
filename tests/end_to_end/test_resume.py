"""An interrupted run that is started again ends bit for bit like an uninterrupted run."""

import dataclasses
import json
import os
from pathlib import Path
import shutil
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.end_to_end.test_smoke_run import smoke_config
from uae_jax import trees
from uae_jax.commands.train import train
from uae_jax.options import Experiment, ProfileOptions, read_config
from uae_jax.training.preemption import PreemptionNotice

STEPS = 6


def short_config() -> Experiment:
  config = smoke_config()
  config.stages = ("clip",)
  # The test process has 8 virtual devices.
  config.mesh.data, config.mesh.fsdp = 4, 2
  config.clip.batch_size = 8
  config.clip.total_steps = STEPS
  config.clip.save_every_steps = 2
  config.tensorboard = False
  config.evaluation.periodic.update(every_steps=2, num_images=4)
  return read_config(config)


def final_params(folder: Path) -> dict[str, np.ndarray]:
  """Name -> array of the `params` of a checkpoint, independent of the sharding with which they were saved."""
  folder = folder.absolute()
  stored = ocp.StandardCheckpointHandler().metadata(folder).tree
  target = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), stored)
  return dict(trees.items(ocp.StandardCheckpointer().restore(folder, target)))


def losses(workdir: Path) -> dict[int, float]:
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {line["step"]: line["loss"] for line in lines if "loss" in line}


def assert_same_end(workdir: Path, uninterrupted: Path):
  ours, theirs = (
    final_params(run / "checkpoints" / "clip" / str(STEPS) / "params") for run in (workdir, uninterrupted)
  )
  assert ours.keys() == theirs.keys()
  for path in ours:
    np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)
  assert losses(workdir) == losses(uninterrupted)


def evaluations(workdir: Path) -> list[tuple[int, float]]:
  lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return [(line["step"], line["evaluation_edit_similarity"]) for line in lines if "evaluation_edit_similarity" in line]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
  """An uninterrupted run; its third step is profiled, which must not change results."""
  workdir = tmp_path_factory.mktemp("run") / "whole"
  train(dataclasses.replace(short_config(), profile=ProfileOptions(first_step=3, num_steps=1)), workdir)
  return workdir


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
  """A run that received SIGTERM in its fourth step; it has the states after steps 2 and 4."""
  workdir = tmp_path_factory.mktemp("run") / "torn"
  original, steps = PreemptionNotice.__call__, []

  def asked(notice):
    steps.append(None)
    if len(steps) == 4:
      os.kill(os.getpid(), signal.SIGTERM)
    return original(notice)

  patch = pytest.MonkeyPatch()
  patch.setattr(PreemptionNotice, "__call__", asked)
  train(short_config(), workdir)
  patch.undo()
  return workdir


def test_sigterm_saves_and_the_same_command_resumes(interrupted, uninterrupted, tmp_path):
  saved = interrupted / "checkpoints" / "clip"
  assert sorted(path.name for path in saved.iterdir() if path.name.isdigit()) == ["2", "4"]
  workdir = shutil.copytree(interrupted, tmp_path / "run")
  train(short_config(), workdir)
  assert_same_end(workdir, uninterrupted)
  assert [step for step, _ in evaluations(uninterrupted)] == [0, 2, 4, 6]
  assert dict(evaluations(workdir)) == dict(evaluations(uninterrupted))


def test_a_kill_leaves_what_was_saved(uninterrupted, tmp_path):
  """After kill -9 there is at most one unfinished step folder, which does not count as a checkpoint."""
  workdir = shutil.copytree(uninterrupted, tmp_path / "run")
  step = workdir / "checkpoints" / "clip" / str(STEPS)
  step.rename(step.with_name(f"{STEPS}.orbax-checkpoint-tmp"))
  train(short_config(), workdir)
  assert_same_end(workdir, uninterrupted)


def test_the_chosen_step_is_traced_and_all_are_measured(uninterrupted):
  assert len(list((uninterrupted / "profile" / "clip").rglob("*.xplane.pb"))) == 1
  lines = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
  first, *others = [line for line in lines if "loss" in line]
  assert "seconds_step" not in first  # The first step compiles.
  assert len(others) == STEPS - 1
  for line in others:
    assert 0 < line["seconds_data"] < line["seconds_step"]
    assert line["images_per_second_per_chip"] > 0 and line["tflops_per_second_per_chip"] > 0
    assert "mfu" not in line  # The peak of this device is unknown.
