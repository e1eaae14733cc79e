"""A mistake in any stage, path or data is reported before anything is loaded or written."""

import dataclasses

import jax
import pytest

from tests.properties import finished_run
from uae_jax import sharding
from uae_jax.commands.train import train
from uae_jax.options import Experiment, MeshOptions, new_config, read_config
from uae_jax.training import rehearsal

LAST = "understanding_for_generation"


@pytest.fixture(scope="module")
def config() -> Experiment:
  return finished_run.smoke_config()


@pytest.fixture(scope="module")
def built(config):
  small = dataclasses.replace(config, stages=("vae",), evaluation=dataclasses.replace(config.evaluation, num_images=0))
  return rehearsal.rehearse(small, sharding.make_mesh(devices=jax.devices()[:1]))[1]


def test_a_run_without_embedders_has_first_parameters(config):
  alone = dataclasses.replace(
    config, stages=("pretrain",), embedders={}, evaluation=dataclasses.replace(config.evaluation, num_images=0)
  )
  _, built = rehearsal.rehearse(alone, sharding.make_mesh(devices=jax.devices()[:1]))
  made = jax.eval_shape(built.init, jax.random.key(0))
  assert jax.tree.structure(made) == jax.tree.structure(built.abstract_params)


def changed(config: Experiment, **fields) -> Experiment:
  return dataclasses.replace(config, **{LAST: dataclasses.replace(config.section(LAST), **fields)})


def test_the_stages_of_the_config_are_right(config, built):
  for name in config.stages:
    rehearsal.check_stage(config, name, built)


def test_a_pattern_that_matches_nothing_names_the_stage(config, built):
  with pytest.raises(ValueError, match=rf"^config\.{LAST}: the stage trains no parameter"):
    rehearsal.check_stage(changed(config, trainable="^decoder/nothing"), LAST, built)


@pytest.mark.parametrize("muon, message", [("nothing", "matches nothing"), ("bias$", "which is no matrix")])
def test_a_pattern_of_muon_is_checked(config, built, muon, message):
  optimizer = dataclasses.replace(config.section(LAST).optimizer, muon=muon)
  with pytest.raises(ValueError, match=rf"^config\.{LAST}: optimizer\.muon = .*{message}"):
    rehearsal.check_stage(changed(config, trainable="^decoder/", optimizer=optimizer), LAST, built)


def test_data_and_paths_are_looked_up(config, built, monkeypatch):
  for wrong, message in (
    (dataclasses.replace(config, embedders={"clip": "/nowhere"}), r"config\.embedders\.clip = '/nowhere': no such"),
    (dataclasses.replace(config, embedders={"clip": __file__}), r"config\.embedders\.clip = .*config\.json"),
    (
      dataclasses.replace(config, init=dataclasses.replace(config.init, checkpoint="/nowhere:vae")),
      r"config\.init\.checkpoint = '/nowhere:vae': no finished stage",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      rehearsal.check_paths(wrong)
  rehearsal.check_batches(config, built.processor)
  open_source = rehearsal.open_source
  monkeypatch.setattr(
    rehearsal, "open_source", lambda data, split: open_source(data, split) if split == "train" else [1]
  )
  with pytest.raises(ValueError, match=r"config\.evaluation\.num_images = 4, but split held_out of .* has 1 records"):
    rehearsal.check_batches(config, built.processor)
  monkeypatch.setattr(rehearsal, "open_source", lambda data, split: [])
  with pytest.raises(ValueError, match=r"config\.data\.source = 'scenes': no records"):
    rehearsal.check_batches(config, built.processor)


def test_a_mistake_leaves_no_workdir(config, tmp_path):
  with pytest.raises(ValueError, match="no such file or folder"):
    train(
      dataclasses.replace(
        config,
        stages=("vae",),
        vae=dataclasses.replace(config.vae, batch_size=8),
        mesh=MeshOptions(data=4, fsdp=2),  # The test process has 8 virtual devices.
        embedders={**config.embedders, "dinov2": "/nowhere"},
      ),
      tmp_path / "run",
    )
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  "field, value, named",
  [
    ("trainable", "(", "trainable = '(': expected a regular expression"),
    ("optimizer.muon", "[", r"optimizer.muon = '[': expected a regular expression"),
    ("optimizer.learning_rate", -1.0, "optimizer.learning_rate = -1.0: expected more than 0"),
    ("optimizer.learning_rate", float("nan"), "optimizer.learning_rate = nan: expected a finite number"),
    ("optimizer.learning_rate", float("inf"), "optimizer.learning_rate = inf: expected a finite number"),
    ("optimizer.clip_norm", -1.0, "optimizer.clip_norm"),
    ("ema_decay", 1.5, "ema_decay = 1.5: expected 0 or more and less than 1"),
    ("log_every_steps", 0, "log_every_steps = 0: expected 1 or more"),
    ("save_every_steps", -1, "save_every_steps = -1"),
    ("options.num_rollouts", 1, "options.num_rollouts = 1: expected 2 or more"),
    ("options.temperature", -1.0, "options.temperature = -1.0"),
    ("options.noise_level", 0.0, "options.noise_level = 0.0: expected more than 0"),
    ("options.sampler", "flwo", "options.sampler = 'flwo': expected one of"),
    ("options.window_range", (3, 3), "options.window_range = (3, 3)"),
    ("options.window", 99, "options.window = 99"),
    ("options.conditioning", "txt", "options.conditioning = 'txt'"),
    ("options.text_tower", "both", "options.text_tower = 'both'"),
    ("options.decode_chunks", 7, "options.decode_chunks = 7 does not divide"),
    ("objective.clip_low", -3.0, "objective.clip_low = -3.0: expected"),
    ("objective.loss", "ppo", "objective.loss = 'ppo'"),
  ],
)
def test_a_setting_of_the_last_stage_is_told_when_the_config_is_read(field, value, named):
  config = new_config()
  config.embedders.update(clip="fresh", dinov2="fresh")
  section = config[LAST]
  *parents, name = field.split(".")
  for parent in parents:
    section = section[parent]
  section[name] = value
  with pytest.raises(ValueError) as caught:
    read_config(config)
  assert str(caught.value).startswith(f"config.{LAST}.{named}"), caught.value
