"""Full captions score 1, partial ones have precision 1, and invented words lower precision but never recall."""

import numpy as np
import pytest

from uae_jax.draws import Draws
from uae_jax.small_world import phrases, scenes
from uae_jax.small_world.caption_scores import aggregate, hallucination_warnings, score
from uae_jax.small_world.scenes import Scene

pytestmark = pytest.mark.fast


def make(background, *objects):
  """A plain scene of objects (place, size, color, shape)."""
  config = scenes.variant("plain")
  array = np.zeros(5, int)
  array[0] = scenes.BACKGROUNDS.index(background)
  for place, size, color, shape in objects:
    number = (scenes.SHAPES.index(shape) * 6 + scenes.COLORS.index(color)) * 2 + scenes.SIZES.index(size)
    array[1 + config.places.index(place)] = 1 + number
  return Scene.from_array(array, config)


TWO = make("black", ("top-left", "large", "green", "cross"), ("bottom-right", "small", "white", "triangle"))


def test_grammar():
  assert phrases.full_caption(TWO) == (
    "black background ; top-left large green cross ; bottom-right small white triangle ;"
  )


@pytest.mark.parametrize("name", scenes.VARIANTS)
@pytest.mark.parametrize("split", scenes.SPLITS)
def test_the_full_caption_says_everything(name, split):
  batch = scenes.scenes(np.arange(200), split, scenes.variant(name))
  for i in range(200):
    result = score(phrases.full_caption(batch[i]), batch[i])
    assert result.recall == result.precision == 1
    assert result.length == result.true_length
    assert not result.missing


@pytest.mark.parametrize("name", ("plain", "shifted", "dense"))
def test_partial_captions_say_only_true_things(name):
  # Without places, a phrase may match another object equally well, so precision is close to 1 but not exactly 1.
  batch = scenes.scenes(np.arange(600), "train", scenes.variant(name))
  texts = phrases.captions_text(batch, "partial", Draws(np.arange(600)))
  figures = aggregate([score(text, batch[i]) for i, text in enumerate(texts)])
  assert figures["caption_precision"] > 0.97
  assert 0.3 < figures["caption_recall"] < 0.55
  assert figures["caption_length"] < 0.6 * figures["true_caption_length"]


@pytest.mark.parametrize(
  "caption, right, claimed",
  [
    ("", 0, 0),
    ("black background ;", 1, 1),
    ("gray background ;", 0, 1),
    ("background ;", 0, 1),
    ("black background ; black background ;", 1, 2),
    ("gray black background ;", 0, 2),
    ("top-left large green cross", 4, 4),  # the last separator may be missing
    ("cross ; triangle ;", 2, 2),
    ("cross ; cross ;", 1, 2),
    ("green green cross ;", 2, 3),
    ("large white cross ;", 2, 3),  # matched to one object, not to the best word of each
    ("bottom-right large green cross ;", 1, 4),  # the place determines the match
    ("top-right large green cross ;", 3, 4),  # no object there: the best match counts
    ("top-left small red circle ; top-left large green cross ;", 1, 8),  # each object is matched once
    ("hello world ;", 0, 2),
    ("; ; ;", 0, 0),
  ],
)
def test_scores(caption, right, claimed):
  result = score(caption, TWO)
  assert (result.num_right, result.num_claimed, result.num_true) == (right, claimed, 9)
  assert result.length == len(caption.split()) == len(result.words)
  assert len(result.missing) == 9 - right


def test_words_are_labelled_for_display():
  result = score("black background ; top-left small green cross ;", TWO)
  assert result.words == (
    ("black", "right"),
    ("background", "neutral"),
    (";", "neutral"),
    ("top-left", "right"),
    ("small", "wrong"),
    ("green", "right"),
    ("cross", "right"),
    (";", "neutral"),
  )
  assert result.missing[0] == "large (top-left green cross)"
  assert len(result.missing) == 5


def test_hallucination_is_noticed():
  before = {"caption_precision": 0.9, "caption_length": 7.0, "true_caption_length": 15.0}
  assert not hallucination_warnings(before, before | {"caption_precision": 0.97, "caption_length": 15.0})
  worse = hallucination_warnings(before, before | {"caption_precision": 0.4, "caption_length": 19.9})
  assert worse == [
    "precision fell from 0.90 to 0.40",
    "captions have 19.9 words, everything there is to say takes 15.0",
  ]
