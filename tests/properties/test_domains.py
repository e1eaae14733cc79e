"""Small-world pictures that no stage trains on: what is new in each folder, and their ground truth."""

import dataclasses
import json

import numpy as np
from PIL import Image
import pytest
from stand_in import StandIn

from uae_jax import cli, embedders
from uae_jax.commands import model_arguments
from uae_jax.evaluation import results
from uae_jax.small_world import domains, phrases, render, scenes

pytestmark = pytest.mark.fast

CONFIG, COUNT = scenes.VARIANTS["plain"], 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  out = tmp_path_factory.mktemp("domains")
  domains.write(out, COUNT)
  return out


@pytest.mark.parametrize("name", domains.VARIANTS)
def test_known_scenes_are_painted_as_they_are_rendered(name):
  config = scenes.VARIANTS[name]
  unshifted = dataclasses.replace(config, shift_px=0)
  for index, picture in enumerate(domains.make("seen", COUNT, config)):
    scene = scenes.scene(index, "held_out", unshifted)
    assert np.array_equal(domains.paint(picture, unshifted), render.render(scene))


@pytest.mark.parametrize("domain, left_out", [("shapes", "shape"), ("colors", "color"), ("sizes", "size")])
def test_what_has_no_word_is_not_in_the_truth(domain, left_out):
  for picture in domains.make(domain, COUNT, CONFIG):
    objects = domains.truth(picture)["objects"]
    assert objects and all(set(thing) == {"place", "size", "color", "shape"} - {left_out} for thing in objects)


def test_counts_and_layouts_are_none_of_training():
  counts = {len(picture.things) for picture in domains.make("counts", 20, CONFIG)}
  assert counts == {0, CONFIG.max_objects + 1}
  known = {(y, x) for y in (8.0, 24.0) for x in (8.0, 24.0)}
  assert not any(thing.center in known for picture in domains.make("layouts", 20, CONFIG) for thing in picture.things)


def test_prompts_have_known_words_in_another_order_or_unknown_words():
  for name, is_known in (("reordered", True), ("abstract", False)):
    for picture, seen in zip(domains.make(name, COUNT, CONFIG), domains.make("seen", COUNT, CONFIG), strict=True):
      words = picture.prompt.split()
      assert (set(words) <= set(phrases.WORDS)) == is_known
      assert {word for thing in seen.things for word in (thing.place, thing.color, thing.shape)} <= set(words)


def test_a_perfect_answer_scores_one_and_each_wrong_part_counts():
  scene = scenes.scene(3, "held_out", CONFIG)
  row = domains.truth(domains.of_scene(scene)) | {"variant": "plain"}
  caption, image = phrases.full_caption(scene), render.render(scene)
  assert set(domains.figures(row, caption, image).values()) == {1.0}
  named = 1 + 3 * len(row["objects"])
  row["objects"][0]["color"] = next(color for color in scenes.COLORS if color != row["objects"][0]["color"])
  wrong = domains.figures(row, caption, image)
  assert wrong["attributes right"] == pytest.approx((named - 1) / named) and wrong["caption recall"] < 1
  extra = domains.figures(row | {"objects": row["objects"][1:]}, caption, image)
  assert extra["attributes right"] == pytest.approx((named - 3) / (named - 2))  # an object that should not be there


class Model(StandIn):
  """Says and draws a teal background."""

  def caption(self, images, **options):
    return ["teal background ;" for _ in images]

  def generate(self, prompts, **options):
    return [Image.new("RGB", (scenes.IMAGE_PX,) * 2, (13, 97, 97)) for _ in prompts]


class Ones:
  """An embedder for which all images are alike."""

  params = {"w": np.ones(1)}

  def embed(self, images):
    return np.ones((len(images), 1), np.float32)


def test_transfer_scores_captions_and_images_against_the_truth(folder, tmp_path, monkeypatch):
  monkeypatch.setattr(model_arguments, "load", lambda arguments: Model())
  monkeypatch.setattr(embedders, "load", lambda kind, path, **options: Ones())
  argv = ["--prompts", str(folder), "--model", "m", "--out", str(tmp_path), "--embedders", "clip=x"]
  assert cli.main(["evaluate", "--suite", "transfer", *argv]) == 0
  metrics = results.read(tmp_path)["scores"]["metrics"]
  given = {"reordered", "abstract"}
  assert set(metrics["attributes right"]["categories"]) == set(domains.DOMAINS)
  assert set(metrics["caption recall"]["categories"]) == set(domains.DOMAINS) - given
  seen = [domains.truth(picture) for picture in domains.make("seen", COUNT, CONFIG)]
  shares = [(row["background"] == "teal") / (1 + 3 * len(row["objects"])) for row in seen]
  assert metrics["attributes right"]["categories"]["seen"] == pytest.approx(np.mean(shares)) and any(shares)
  said = json.loads((tmp_path / "items.jsonl").read_text().splitlines()[0])
  assert said["key"].startswith("abstract/") and said["caption"].startswith("a ")


def test_damaged_truth_is_named(tmp_path):
  (tmp_path / "truth.jsonl").write_text('{"image": "a/0.png", "variant": "plain"}\n')
  with pytest.raises(ValueError, match="truth.jsonl, line 1: not ground truth"):
    domains.read_truth(tmp_path)
