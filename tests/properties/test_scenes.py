"""Scenes depend only on their index, splits are disjoint, and images and captions match the scene exactly."""

import json
import subprocess
import sys

import numpy as np
import pytest

from uae_jax.draws import Draws
from uae_jax.small_world import paraphrases, phrases, render, scenes
from uae_jax.small_world.scenes import Scene

pytestmark = pytest.mark.fast

VARIANTS = tuple(scenes.VARIANTS)
ONE_OF_EACH_DIGEST = """
import hashlib, numpy as np
from uae_jax.small_world import phrases, render, scenes
from uae_jax.draws import Draws
digest = hashlib.sha256()
for name, config in scenes.VARIANTS.items():
  for split in scenes.SPLITS:
    batch = scenes.scenes(np.arange(64), split, config)
    digest.update(render.render_batch(batch).tobytes())
    for mode in phrases.CAPTIONS:
      digest.update("|".join(phrases.captions_text(batch, mode, Draws(np.arange(64)))).encode())
    digest.update(scenes.edit_groups(batch, Draws(np.arange(64))).to_array().tobytes())
print(digest.hexdigest())
"""


def pair_words(caption: str) -> set[tuple[str, str]]:
  """(shape, color) of every phrase, from the text alone."""
  words = [phrase.split() for phrase in caption.split(";")]
  return {(w[-1], w[-2]) for w in words if len(w) > 2 and not set(w) & {"background", *paraphrases.RELATIONS}}


def test_another_process_makes_the_same_world():
  outputs = {
    subprocess.run(
      [sys.executable, "-c", ONE_OF_EACH_DIGEST],
      env={"PYTHONHASHSEED": seed, "PATH": ""},
      capture_output=True,
      check=True,
      text=True,
    ).stdout
    for seed in ("1", "2")
  }
  assert len(outputs) == 1


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("split", scenes.SPLITS)
def test_a_scene_does_not_depend_on_its_batch(name, split):
  config = scenes.variant(name)
  indices = np.array([5, 2**30 - 1, 0, 77, 5])
  batch = scenes.scenes(indices, split, config)
  captions = phrases.captions_text(batch, "partial", Draws(indices, 3))
  groups = scenes.edit_groups(batch, Draws(indices, 4))
  for row, index in enumerate(indices):
    one = scenes.scene(int(index), split, config)
    np.testing.assert_array_equal(one.to_array(), batch[row].to_array())
    np.testing.assert_array_equal(render.render(one), render.render_batch(batch)[row])
    assert phrases.captions_text(one[None], "partial", Draws([index], 3)) == [captions[row]]
    alone = scenes.edit_groups(one[None], Draws([index], 4))
    np.testing.assert_array_equal(alone.to_array()[0], groups.to_array()[row])


@pytest.mark.parametrize("name", VARIANTS)
def test_splits_are_disjoint(name):
  found = {}
  for split in scenes.SPLITS:
    batch = scenes.scenes(np.arange(5000), split, scenes.variant(name))
    assert np.all(scenes.split_of(batch) == split)
    found[split] = {row.tobytes() for row in batch.to_array()}
  assert not found["train"] & found["held_out"]
  assert not found["train"] & found["held_out_pairs"]
  assert not found["held_out"] & found["held_out_pairs"]


@pytest.mark.parametrize("name", VARIANTS)
def test_unseen_pairs_are_never_said_in_training(name):
  config = scenes.variant(name)
  batch = scenes.scenes(np.arange(20_000), "train", config)
  edits = scenes.edit_groups(batch[:2000], Draws(np.arange(2000)))[:, 1]
  said = set().union(*map(pair_words, phrases.captions_text(batch, "full") + phrases.captions_text(edits, "full")))
  unseen = set(scenes.HELD_OUT_PAIRS)
  everything = {(shape, color) for shape in config.shapes for color in config.colors}
  assert said == everything - unseen
  for caption in phrases.captions_text(scenes.scenes(np.arange(500), "held_out_pairs", config), "full"):
    assert pair_words(caption) & unseen


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("split", ("train", "held_out"))
def test_no_split_lacks_an_attribute(name, split):
  config = scenes.variant(name)
  batch = scenes.scenes(np.arange(4000), split, config)
  counts = {name: len(getattr(config, f"{name}s")) for name in ("shape", "color", "size", "texture")}
  for field, count in (*counts.items(), ("shift", config.num_shifts)):
    share = np.bincount(getattr(batch, field)[batch.present], minlength=count) / np.sum(batch.present)
    assert np.all(share > 0.7 / count)
  assert np.all(np.bincount(batch.background, minlength=4) > 800)
  assert np.all(np.bincount(batch.present.sum(1))[1:] > 0.6 * 4000 / config.max_objects)


@pytest.mark.parametrize("name", VARIANTS)
def test_images_show_the_scene(name):
  config = scenes.variant(name)
  count = 100 if name == "rich" else 300
  batch = scenes.scenes(np.arange(count), "train", config)
  images = render.render_batch(batch)
  assert images.dtype == np.uint8 and images.shape == (count, config.image_px, config.image_px, 3)
  objects, background = render.detect(images, config)
  np.testing.assert_array_equal(objects, batch.named().objects())
  np.testing.assert_array_equal(background, batch.background)
  assert render.detection_accuracy(images, batch) == {"object_accuracy": 1.0, "scene_accuracy": 1.0}
  # The detector tolerates noise of 4 gray levels; it is not fooled by another scene.
  noisy = np.clip(images + np.random.default_rng(0).normal(0, 4, images.shape), 0, 255)
  assert render.detection_accuracy(noisy, batch)["object_accuracy"] > 0.98
  assert render.detection_accuracy(np.roll(images, 1, axis=0), batch)["object_accuracy"] < 0.2


@pytest.mark.parametrize("name", VARIANTS)
def test_every_two_cells_look_different(name):
  config = scenes.variant(name)
  cells = render._cells(config).astype(np.float32)
  if not config.names_shift:  # only what captions name must look different: one shift will do
    cells = np.concatenate([cells[:, :1], cells[:, 1 :: config.num_shifts]], axis=1)
  for bank in cells.reshape(len(cells), cells.shape[1], -1):
    distance = np.sum(bank**2, 1)[:, None] + np.sum(bank**2, 1) - 2 * bank @ bank.T
    assert np.min(distance + np.eye(len(bank)) * 1e9) > 1000


@pytest.mark.parametrize("name", VARIANTS)
def test_arrays_round_trip_and_identities_tell_scenes_apart(name):
  config = scenes.variant(name)
  batch = scenes.scenes(np.arange(3000), "train", config)
  array = batch.to_array()
  np.testing.assert_array_equal(Scene.from_array(array, config).to_array(), array)
  identity = batch.identity()
  assert identity.min() >= 0 and identity.max() < 2**31
  assert len(set(identity.tolist())) == len({row.tobytes() for row in array})
  with pytest.raises(ValueError, match="data.variant"):
    Scene.from_array(array[:, :-1], config)


@pytest.mark.parametrize("name", VARIANTS)
def test_edits_are_near_and_in_training(name):
  config = scenes.variant(name)
  batch = scenes.scenes(np.arange(1000), "train", config)
  groups = scenes.edit_groups(batch, Draws(np.arange(1000)))
  array = groups.to_array()
  assert array.shape == (1000, 4, 1 + len(config.places))
  np.testing.assert_array_equal(array[:, 0], batch.to_array())
  assert np.all(scenes.split_of(groups) == "train")
  changed = np.sum(array[:, 1:3] != array[:, :1], axis=-1)
  assert np.all(changed >= 1)  # an edit always differs from the scene
  assert np.all(changed <= 2)  # the edit, and the background if it had to change to stay in the training split
  assert np.all((groups.present.sum(-1) >= 1) & (groups.present.sum(-1) <= config.max_objects))
  # All kinds of edits occur: background; object added, removed, changed.
  before, after = array[:, 0, 1:], array[:, 1, 1:]
  assert np.any(array[:, 0, 0] != array[:, 1, 0])
  for kind in (
    (before == 0) & (after > 0),
    (before > 0) & (after == 0),
    (before > 0) & (after > 0) & (before != after),
  ):
    assert np.sum(kind) > 20


def test_lengths_of_the_recipe():
  batch = scenes.scenes(np.arange(20_000))
  full = [len(text.split()) for text in phrases.captions_text(batch, "full")]
  assert max(full) == scenes.variant("plain").max_caption_words == 23
  assert np.mean(full) == pytest.approx(3 + 5 * 2.5, abs=0.15)  # 1 to 4 objects
  partial = [len(text.split()) for text in phrases.captions_text(batch, "partial", Draws(np.arange(20_000)))]
  assert np.mean(partial) / np.mean(full) == pytest.approx(7.05 / 14.95, abs=0.02)
  assert min(partial) >= 2  # at least one object, by its shape
  mixed = phrases.captions_text(batch, "mixed", Draws(np.arange(20_000)))
  is_full = np.mean([text == full for text, full in zip(mixed, phrases.captions_text(batch, "full"), strict=True)])
  assert is_full == pytest.approx(phrases.FULL_FRACTION + 0.01, abs=0.02)


def test_ground_truth_is_json():
  truth = phrases.attributes(scenes.scene(0, "train", scenes.variant("shifted")))
  assert json.loads(json.dumps(truth)) == truth
  assert set(truth["objects"][0]) == {"place", "size", "color", "shape", "shift"}


def test_unknown_names_are_named():
  with pytest.raises(ValueError, match="held_out_pairs"):
    scenes.scenes([0], "test")
  with pytest.raises(ValueError, match="data.variant = 'huge'"):
    scenes.variant("huge")


def test_draws_are_uniform_and_independent():
  draws = Draws(np.arange(4000), 7)
  a, b = draws.uniform(3), draws.uniform(3)
  values = np.concatenate([a, b], axis=1)
  assert np.all((values >= 0) & (values < 1))
  np.testing.assert_allclose(values.mean(0), 0.5, atol=0.02)
  np.testing.assert_allclose(values.var(0), 1 / 12, atol=0.005)
  assert np.max(np.abs(np.corrcoef(values.T) - np.eye(6))) < 0.06
  neighbours = np.corrcoef(values[:-1, 0], values[1:, 0])[0, 1]
  assert abs(neighbours) < 0.06
