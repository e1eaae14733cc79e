"""Understanding and following, measured against the ground truth of scenes."""

from collections import Counter
import dataclasses

import numpy as np
import pytest

from uae_jax.draws import Draws
from uae_jax.small_world import paraphrases, phrases, render, scenes
from uae_jax.small_world.caption_scores import score
from uae_jax.small_world.following import categories
from uae_jax.small_world.forced_choice import KINDS, accuracy, forced_choices, kinds_of
from uae_jax.small_world.ground_truth import GroundTruth

pytestmark = pytest.mark.fast

COUNT = 300


def world(name: str) -> scenes.Scene:
  return scenes.scenes(np.arange(COUNT), "held_out", scenes.variant(name))


def without_relation(words: list[str]) -> list[str]:
  """A caption without its last phrase if that is a relation, which names two objects again."""
  return words[:-6] if set(words) & set(paraphrases.RELATIONS) else words


@pytest.mark.parametrize("name", scenes.VARIANTS)
def test_a_choice_changes_one_thing(name):
  scene = world(name)
  choices = forced_choices(scene, Draws(np.arange(COUNT), 4))
  assert [choice.kind for choice in choices] == list(kinds_of(scene.config))
  vocabulary = {
    "shape": scene.config.shapes,
    "color": scene.config.colors,
    "size": scene.config.sizes,
    "texture": scene.config.textures,
    "count": paraphrases.COUNTS,
    "relation": paraphrases.RELATIONS,
    "place": scene.config.places,
    "background": scenes.BACKGROUNDS,
  }
  for choice in choices:
    assert choice.is_possible.mean() > 0.5
    for row in np.flatnonzero(choice.is_possible):
      true, changed = phrases.captions_text(scene[row][None], "full")[0].split(), choice.captions[row].split()
      assert len(true) == len(changed) and true != changed
      if choice.kind != "relation":
        true, changed = without_relation(true), without_relation(changed)
      gone, new = Counter(true) - Counter(changed), Counter(changed) - Counter(true)
      if choice.kind == "binding":
        assert not gone and not new
      else:
        (old_word,), (new_word,) = gone, new
        assert {old_word, new_word} <= set(vocabulary[choice.kind])
    is_of_object = choice.kind not in ("binding", "background", "count", "relation")
    assert np.all((choice.size >= 0) == is_of_object)


def test_a_changed_relation_or_count_is_false():
  scene = world("rich")
  for choice in forced_choices(scene, Draws(np.arange(COUNT), 4)):
    for row in np.flatnonzero(choice.is_possible):
      assert score(choice.captions[row], scene[row]).precision < 1


def test_choices_depend_on_the_row_alone():
  scene = world("plain")
  first, second = (forced_choices(scene[rows], Draws(rows, 4)) for rows in (np.arange(20), np.array([7, 3])))
  for whole, part in zip(first, second, strict=True):
    assert part.captions == [whole.captions[7], whole.captions[3]]


def test_accuracy_by_kind_and_size():
  scene = world("plain")
  choices = forced_choices(scene, Draws(np.arange(COUNT), 4))
  is_right = np.zeros((COUNT, len(KINDS)), bool)
  is_right[:, KINDS.index("color")] = True
  figures = accuracy(choices, is_right)
  assert figures["forced_choice_color"] == 1 and figures["forced_choice_shape"] == 0
  possible = sum(choice.is_possible.sum() for choice in choices)
  assert figures["forced_choice"] == pytest.approx(COUNT / possible)
  is_large = choices[KINDS.index("color")].size == scenes.SIZES.index("large")
  is_right[:] = False
  is_right[is_large, KINDS.index("color")] = True
  figures = accuracy(choices, is_right)
  assert figures["forced_choice_small"] == 0 and figures["forced_choice_large"] > 0.2
  alone = dataclasses.replace(scene, present=np.arange(4) == np.zeros((COUNT, 1)))
  assert "forced_choice_binding" not in accuracy(forced_choices(alone, Draws(np.arange(COUNT), 4)), is_right)


@pytest.mark.parametrize("name", scenes.VARIANTS)
def test_originals_follow_their_captions(name):
  scene = world(name)
  found = categories(render.render_batch(scene), scene)
  always = ("single_object", "two_objects", "counting", "position", "colors", "shapes", "sizes", "binding")
  assert set(found) == {*always, *(("textures", "relations") if scene.config.is_paraphrased else ())}
  assert set(found.values()) == {1.0}


def test_a_fault_shows_in_its_category():
  scene = world("plain")

  def found(**changes) -> dict[str, float]:
    return categories(render.render_batch(dataclasses.replace(scene, **changes)), scene)

  recolored = found(color=(scene.color + 1) % len(scenes.COLORS))
  assert recolored["colors"] == recolored["binding"] == recolored["single_object"] == 0
  assert recolored["counting"] == recolored["position"] == recolored["shapes"] == recolored["sizes"] == 1
  resized = found(size=1 - scene.size)
  assert resized["sizes"] == 0 and resized["binding"] == resized["colors"] == 1
  first = np.cumsum(scene.present, axis=-1) == 1
  fewer = found(present=scene.present & ~(first & scene.present))
  assert fewer["counting"] == 0 and 0 < fewer["position"] < 1


def test_more_words_gain_nothing_at_half_length():
  truth = GroundTruth(world("plain"))
  full = [phrases.full_caption(truth.scene[row]) for row in range(COUNT)]
  halves = [" ".join(text.split()[: len(text.split()) // 2]) for text in full]
  whole, half = truth.figures(full), truth.figures(halves)
  assert whole["caption_recall"] == 1 and half["caption_recall"] < 0.7
  for name in ("half_caption_recall", "half_caption_precision"):
    assert whole[name] == half[name]
  wrong_first = [" ".join(["purple"] * len(text.split())) + " ; " + text for text in full]
  assert truth.figures(wrong_first)["half_caption_recall"] < 0.3
