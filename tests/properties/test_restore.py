"""UAE.load on the workdir of a run: the newest finished stage, or one clear error if there is none."""

import json
import shutil

import jax
import numpy as np
from PIL import Image
import pytest

from tests.properties import finished_run
import uae_jax
from uae_jax import sharding, trees


@pytest.fixture(scope="module")
def smoke_config():
  return finished_run.smoke_config()


@pytest.fixture(scope="module")
def run(tmp_path_factory, smoke_config):
  """(workdir, parameters before, parameters after) of a run with two finished last stages, made without training."""
  workdir = tmp_path_factory.mktemp("runs") / "smoke"
  return workdir, *finished_run.write(workdir, smoke_config)


def assert_equal(ours, theirs):
  for path, leaf in trees.items(ours):
    np.testing.assert_array_equal(np.asarray(leaf), np.asarray(dict(trees.items(theirs))[path]), err_msg=path)


def test_the_newest_stage_is_used(run, smoke_config):
  workdir, _, after = run
  uae = uae_jax.UAE.load(workdir, dtype="float32")
  assert_equal(uae.params, after)
  assert uae.is_small_world
  picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 40, 3), np.uint8))
  captions, images = uae.reconstruct([picture], max_new_tokens=4, steps=1)
  assert len(captions) == 1 and images[0].size == (smoke_config.data.image_px,) * 2


def test_bfloat16_and_a_mesh(run):
  uae = uae_jax.UAE.load(run[0], dtype="bfloat16", mesh=sharding.make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4]))
  layers = uae.params["captioner"]["language"]["layers"]["mlp"]["up"]
  assert layers["kernel"].dtype == "bfloat16" and layers["lora_a"].dtype == "float32"
  assert layers["kernel"].addressable_shards[0].data.size == layers["kernel"].size // 4


def test_an_unfinished_run_gives_the_last_finished_stage(run, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(run[0], workdir)
  shutil.rmtree(workdir / "checkpoints" / "understanding_for_generation")
  with pytest.warns(UserWarning, match="the run is not finished; using what cold_start left"):
    assert_equal(uae_jax.UAE.load(workdir, dtype="float32").params, run[1])


def test_a_damaged_checkpoint_gives_the_one_before(run, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(run[0], workdir)
  for file in (workdir / "checkpoints" / "understanding_for_generation" / "2" / "params").rglob("*"):
    if file.is_file() and file.parent.name == "d":
      file.write_bytes(b"torn")
  with pytest.warns(UserWarning, match="cannot be read, trying the one before"):
    assert_equal(uae_jax.UAE.load(workdir, dtype="float32").params, run[1])


def test_no_finished_stage(run, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(run[0], workdir)
  shutil.rmtree(workdir / "checkpoints")
  (workdir / "checkpoints" / "cold_start").mkdir(parents=True)
  with pytest.raises(ValueError, match="no stage of this run is finished"):
    uae_jax.UAE.load(workdir)


def test_a_run_of_other_sizes(run, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(run[0], workdir)
  file = workdir / "model.json"
  sizes = json.loads(file.read_text())
  sizes["uae"]["connector"]["hidden_width"] = 32
  file.write_text(json.dumps(sizes))
  with pytest.raises(ValueError, match="holds another model than its model.json describes.*connector"):
    uae_jax.UAE.load(workdir)
  file.unlink()
  with pytest.raises(ValueError, match="model.json: no such file"):
    uae_jax.UAE.load(workdir)


def test_foreign_folders(tmp_path):
  with pytest.raises(FileNotFoundError, match="no such folder"):
    uae_jax.UAE.load(tmp_path / "nothing")
  (tmp_path / "checkpoints").mkdir()
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
  with pytest.raises(ValueError, match="not the config of a run of uae-jax"):
    uae_jax.UAE.load(tmp_path)
