"""Files of the previous version: an export, a workdir and its report can be read; resuming is refused."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.properties import finished_run
import uae_jax
from uae_jax import sharding, trees
from uae_jax.commands import convert
from uae_jax.options import read_config
from uae_jax.report.run import Stage, read_run
from uae_jax.training import initial
from uae_jax.weights import legacy

OLD_NETS = {"vae": "autoencoder", "embedders": "encoders"}
OLD_FIELDS = OLD_NETS | {"held_out_embedder": "held_out_encoder"}


def old_tree(params):
  return {OLD_NETS.get(net, net): branch for net, branch in params.items()}


def old_fields(plain):
  if isinstance(plain, dict):
    return {OLD_FIELDS.get(name, name): old_fields(value) for name, value in plain.items() if name != "config_version"}
  return [old_fields(value) for value in plain] if isinstance(plain, list) else plain


def old_sizes(plain):
  """`model.json` with the old name of the image side in embedder networks."""
  sizes = old_fields(plain)
  for embedder in sizes["encoders"].values():
    embedder["network"]["image_size"] = embedder["network"].pop("image_px")
  return sizes


def old_config(plain):
  config = old_fields(plain)
  config["stages"] = ["autoencoder" if name == "vae" else name for name in config["stages"]]
  config["cold_start"]["options"] = {"encoder": "clip"}
  config["autoencoder"]["trainable"] = "^autoencoder/"
  config["clip"]["trainable"] = "^(encoders/clip|contrastive)/"
  return config


def assert_equal(ours, theirs):
  ours, theirs = dict(trees.items(ours)), dict(trees.items(theirs))
  assert set(ours) == set(theirs)
  for path, leaf in ours.items():
    np.testing.assert_array_equal(np.asarray(leaf), np.asarray(theirs[path]), err_msg=path)


@pytest.fixture(scope="module")
def old_run(tmp_path_factory):
  """(workdir with the old names, parameters after the VAE stage, parameters after the last of its two stages)."""
  workdir = tmp_path_factory.mktemp("runs") / "old"
  config = finished_run.smoke_config()
  before, after = finished_run.write(workdir, config)
  shutil.rmtree(workdir / "checkpoints")
  finished_run.edit_json(workdir / "config.json", old_config)
  finished_run.edit_json(workdir / "model.json", old_sizes)
  plain = json.loads((workdir / "config.json").read_text())
  for stage, params in (("autoencoder", before), ("understanding_for_generation", after)):
    finished_run.save_stage(workdir / "checkpoints" / stage, old_tree(params), plain)
    shutil.rmtree(next((workdir / "checkpoints" / stage).glob("*/checksums")))  # which that version did not write
  return workdir, before, after


def nets(params):
  return {name: branch for name, branch in params.items() if name != "embedders"}


def test_the_model_of_an_old_run(old_run):
  workdir, _, after = old_run
  uae = uae_jax.UAE.load(workdir, dtype="float32")
  assert uae.is_small_world
  assert_equal(uae.params, nets(after))


def test_an_old_run_that_ended_with_the_vae(old_run, tmp_path):
  shutil.copytree(old_run[0], tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "understanding_for_generation")
  with pytest.warns(UserWarning, match="the run is not finished; using what autoencoder left"):
    assert_equal(uae_jax.UAE.load(tmp_path / "run", dtype="float32").params, nets(old_run[1]))


@pytest.mark.parametrize("stage", ["autoencoder", "vae"])
def test_a_stage_of_an_old_run_is_a_start(old_run, stage):
  workdir, before, _ = old_run
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), before)
  assert_equal(initial.read_checkpoint(f"{workdir}:{stage}", abstract), before)


def test_an_old_run_converts_to_a_new_export(old_run, tmp_path):
  convert.convert(old_run[0], tmp_path / "export", "orbax")
  assert json.loads((tmp_path / "export" / "uae.json").read_text())["format"] == "uae_jax checkpoint 2"
  assert_equal(uae_jax.UAE.load(tmp_path / "export", dtype="auto").params, nets(old_run[2]))


def test_an_old_export(old_run, tmp_path):
  """The export loads bit for bit, with the stored dtypes."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  convert.convert(old_run[0], tmp_path / "new", "orbax")
  params = uae_jax.UAE.load(tmp_path / "new", dtype="bfloat16", mesh=mesh).params
  old = tmp_path / "old"
  shutil.copytree(tmp_path / "new", old, ignore=shutil.ignore_patterns("params"))
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(old / "params", old_tree(params))
  dtypes = {path: leaf.dtype.name for path, leaf in trees.items(old_tree(params))}
  finished_run.edit_json(
    old / "uae.json",
    lambda content: old_fields(content) | {"format": "uae_jax checkpoint 1", "dtypes": dtypes},
  )
  assert json.loads((old / "uae.json").read_text())["config"]["autoencoder"]
  uae = uae_jax.UAE.load(old, dtype="auto")
  assert_equal(uae.params, params)
  assert uae.params["vae"]["encoder"]["conv_in"]["kernel"].dtype == "bfloat16"


def test_an_unknown_export_is_refused(tmp_path):
  with pytest.raises(ValueError, match="uae.json: format 'uae_jax checkpoint 3', expected 'uae_jax checkpoint 2'"):
    legacy.current_export({"format": "uae_jax checkpoint 3"}, tmp_path / "uae.json")


def test_the_report_of_an_old_run(old_run, tmp_path):
  workdir = tmp_path / "run"
  (workdir / "evaluation").mkdir(parents=True)
  shutil.copy(old_run[0] / "config.json", workdir)
  for stage in ("captioner", "autoencoder", "clip"):
    (workdir / "evaluation" / f"{stage}.json").write_text('{"psnr": 20.0}')
  stages = read_run(workdir).stages
  assert [stage.name for stage in stages] == ["clip", "autoencoder", "captioner"]
  assert (stages[1].title, stages[1].moment) == (Stage("vae").title, Stage("vae").moment)


def test_an_old_run_is_not_resumed(old_run):
  plain = json.loads((old_run[0] / "config.json").read_text())
  with pytest.raises(ValueError, match=r"no config_version, expected 2: .*cannot be resumed.*checkpoint=.*:STAGE"):
    legacy.refuse_old(plain, old_run[0])
  legacy.refuse_old(plain | {"config_version": legacy.CONFIG_VERSION}, old_run[0])


def test_an_old_config_in_the_names_of_today(old_run):
  plain = json.loads((old_run[0] / "config.json").read_text())
  config = legacy.current_config(plain)
  assert "vae" in config["stages"] and "autoencoder" not in config["stages"]
  assert read_config({name: value for name, value in config.items() if name != "config_version"}).stages[2] == "vae"
  assert config["evaluation"]["embedders"] == ["clip", "dinov2"] and config["embedders"]["clip"] == "fresh"
  assert legacy.current_config(config) == config
