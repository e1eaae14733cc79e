"""UAE.load on the workdir of a run: the newest finished stage, or one clear error if there is none."""

import json
import re
import shutil

import jax
import numpy as np
from PIL import Image
import pytest

from tests.properties import finished_run
import uae_jax
from uae_jax import sharding, trees
from uae_jax.training import restore


@pytest.fixture(scope="module")
def smoke_config():
  return finished_run.smoke_config()


@pytest.fixture(scope="module")
def run(tmp_path_factory, smoke_config):
  """(workdir, parameters before, parameters after) of a run with two finished last stages, made without training."""
  workdir = tmp_path_factory.mktemp("runs") / "smoke"
  return workdir, *finished_run.write(workdir, smoke_config)


@pytest.fixture(scope="module")
def loaded(run):
  return uae_jax.UAE.load(run[0], dtype="float32")


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


def test_a_checkpoint_names_the_stage_that_is_used(run):
  workdir, before, _ = run
  folder = workdir / "checkpoints" / finished_run.STAGES[0]
  for path in (folder, folder / "2"):
    assert_equal(uae_jax.UAE.load(path, dtype="float32").params, before)


def test_an_embedder_of_a_run_stretches_images_as_the_run_does(run, loaded, smoke_config):
  workdir, _, after = run
  embedder = restore.load_embedder("clip", workdir)
  assert_equal(embedder.params, after["embedders"]["clip"])
  pixels = np.random.default_rng(0).integers(0, 256, (1, *(smoke_config.data.image_px,) * 2, 3), np.uint8)
  expected = embedder.network(embedder.params, pixels / 127.5 - 1.0)
  np.testing.assert_allclose(embedder.embed([Image.fromarray(pixels[0])]), expected, atol=1e-5)
  with pytest.raises(ValueError, match="has no embedder siglip2; it has clip, dinov2"):
    restore.load_embedder("siglip2", workdir)


PROMPT = "black background ;"


def test_noise_depends_on_the_seed_and_the_index_alone(loaded):
  """Not on the batch; and two seeds share no noise."""
  uae = loaded
  options = dict(steps=1, output="array")
  images = uae.generate([PROMPT] * 3, **options)
  np.testing.assert_allclose(uae.generate([PROMPT], indices=[2], **options)[0], images[2], atol=2e-5)
  others = uae.generate([PROMPT] * 3, seed=1, **options)
  assert len({image.tobytes() for image in (*images, *others)}) == 6
  picture = Image.new("RGB", (20, 20), "red")
  captions = uae.caption([picture] * 3, max_new_tokens=8, temperature=5.0)
  assert len(set(captions)) == 3
  assert uae.caption([picture], max_new_tokens=8, temperature=5.0, indices=[2]) == captions[2:]
  assert uae.caption([picture], max_new_tokens=8, temperature=5.0, top_k=1) == uae.caption(
    [picture], max_new_tokens=8, temperature=0
  )


@pytest.mark.parametrize(
  ("method", "option", "expected"),
  [
    ("caption", dict(temperature=float("nan")), "temperature = nan: expected a finite number"),
    ("caption", dict(temperature=-1.0), "temperature = -1.0: expected 0 or more"),
    ("caption", dict(max_new_tokens=0), "max_new_tokens = 0: expected 1 or more"),
    ("caption", dict(repetition_penalty=0.0), "repetition_penalty = 0.0: expected a finite number, more than 0"),
    ("caption", dict(top_p=0.0), "top_p = 0.0: expected more than 0 and 1 or less"),
    ("caption", dict(seed=-1), "seed = -1: expected 0 to 4294967295"),
    ("caption", dict(indices=[0, 1]), "1 images, but 2 indices"),
    ("generate", dict(seed=2**32), "seed = 4294967296: expected 0 to 4294967295"),
    ("generate", dict(steps=0), "sampler_steps = 0: expected 1 or more"),
    ("generate", dict(guidance=float("nan")), "guidance = nan: expected a finite number"),
    ("generate", dict(guidance=1.0, guidance_interval=(0.2, 0.5)), "does nothing with guidance = 1"),
    ("generate", dict(guidance=2.0, guidance_interval=(0.5, 0.2)), "expected 0 <= first < last <= 1"),
    ("generate", dict(height=0), "0 x 32 px: sides must be multiples of"),
    ("generate", dict(width=1 << 20), "32 x 1048576 px: sides must be multiples of"),
    ("generate", dict(latents=np.zeros((2, 4, 4, 16))), "the shape [2, 4, 4, 16], expected [1, 4, 4, 16]"),
    ("generate", dict(latents=np.zeros((1, 4, 4, 3))), "the shape [1, 4, 4, 3], expected [1, 4, 4, 16]"),
    ("generate", dict(latents=np.zeros((1, 2, 2, 16)), height=32), "the shape [1, 2, 2, 16], expected [1, 4, 4, 16]"),
    ("generate", dict(steps="4"), "sampler_steps = '4': expected int"),
    ("generate", dict(batch_size=1.5), "batch_size = 1.5: expected a whole number"),
    ("generate", dict(seed=1.5), "seed = 1.5: expected a whole number"),
    ("generate", dict(indices=[-1]), "an index = -1: expected 0 to 4294967295"),
    ("caption", dict(top_k=2.5), "top_k = 2.5: expected int"),
    ("caption", dict(repetition_penalty="1.1"), "repetition_penalty = '1.1': expected float"),
  ],
)
def test_options_out_of_range(loaded, method, option, expected):
  argument = Image.new("RGB", (20, 20)) if method == "caption" else PROMPT
  with pytest.raises(ValueError, match=re.escape(expected)):
    getattr(loaded, method)([argument], **option)


@pytest.mark.parametrize(
  ("method", "arguments", "expected"),
  [
    ("generate", ["red"], "prompts is one text, expected a list"),
    ("generate", [["red", "x" * 40_000]], "prompts[1] has 40000 characters, expected 32000 or fewer"),
    ("generate", [["red", None]], "prompts[1] is of type NoneType, expected a text"),
    ("generate", [["\ud800"]], r"prompts[0] contains '\ud800' at character 0, which is not text"),
    ("encode_text", ["red"], "prompts is one text"),
    ("log_probs", [[Image.new("RGB", (20, 20))], "red"], "captions is one text"),
    ("caption", [Image.new("RGB", (20, 20))], "images is one Image, expected a list"),
    ("caption", [[None]], "an image is of type NoneType, expected a path"),
    ("caption", ["photo.jpg"], "images is one str, expected a list"),
    ("caption", [np.zeros((20, 20, 3), np.uint8)], "images is one ndarray, expected a list"),
  ],
)
def test_one_text_or_image_is_not_taken_for_a_list(loaded, method, arguments, expected):
  with pytest.raises(ValueError, match=re.escape(expected)):
    getattr(loaded, method)(*arguments)


def test_nothing_gives_nothing(loaded):
  assert loaded.caption([]) == [] and loaded.generate([]) == []
  with pytest.raises(ValueError, match="at least one text"):
    loaded.encode_text([])
  assert loaded.generate([], output="array").shape == (0, 32, 32, 3)


def test_numbers_that_are_not_finite_are_no_result(run):
  uae = uae_jax.UAE.load(run[0], dtype="float32")
  uae.params = jax.tree.map(lambda leaf: leaf * np.nan if leaf.dtype == np.float32 else leaf, uae.params)
  with pytest.raises(ValueError, match="probabilities of a caption's tokens are not finite"):
    uae.caption([Image.new("RGB", (20, 20))], max_new_tokens=2)
  with pytest.raises(ValueError, match="pixels that are not finite"):
    uae.generate([PROMPT], steps=1)


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
  with pytest.warns(
    UserWarning, match="understanding_for_generation/2/params .* cannot be read: using .*cold_start/2 instead"
  ):
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
