"""Captions of the variant "rich" are read exactly, whatever their words and their order."""

import numpy as np
import pytest

from tests.processors import processor_of
from uae_jax.data.sources import open_source
from uae_jax.draws import Draws
from uae_jax.options import DataOptions
from uae_jax.small_world import paraphrases, phrases, scenes
from uae_jax.small_world.caption_scores import aggregate, score
from uae_jax.small_world.processor import RICH, make_tokenizer
from uae_jax.small_world.scenes import Scene

pytestmark = pytest.mark.fast

RICH_WORLD = scenes.variant("rich")


def world(count: int, start: int = 0) -> Scene:
  return scenes.scenes(np.arange(start, start + count), "train", RICH_WORLD)


def assert_round_trip(start: int, count: int) -> list[str]:
  scene = world(count, start)
  texts = phrases.captions_text(scene, "full", Draws(np.arange(start, start + count), 1))
  for row, text in enumerate(texts):
    found = score(text, scene[row])
    assert found.recall == found.precision == 1 and not found.missing, text
  return texts


def test_every_paraphrase_says_everything_and_nothing_else():
  texts = assert_round_trip(0, 1500)
  said = {word for text in texts for word in text.split()}
  assert said == set(paraphrases.WORDS)
  lengths = [len(text.split()) for text in texts]
  assert max(lengths) == RICH_WORLD.max_caption_words == 60
  names = ("place", "shape", "color", "size", "texture")
  kinds = {word: name for name in names for word in getattr(RICH_WORLD, f"{name}s")}
  first = [[paraphrases.CANONICAL.get(word, word) for word in text.split(" ; ")[2].split()] for text in texts]
  assert len({tuple(kinds[word] for word in words if word in kinds) for words in first}) == 4  # word orders


def test_a_wrong_word_is_found_in_every_paraphrase():
  scene, rows = world(300), np.arange(300)
  others = scenes.edit(scene, Draws(rows, 5))
  texts = phrases.captions_text(others, "full", Draws(rows, 6))
  for row, text in enumerate(texts):
    is_shift = np.array_equal(scene[row].named().to_array(), others[row].named().to_array())
    found = score(text, scene[row])
    assert (found.precision == found.recall == 1) == is_shift


def make(*objects: tuple[str, str, str, str, str]) -> Scene:
  """A scene on teal of objects (place, size, texture, color, shape)."""
  empty = np.zeros(9, np.int64)
  fields = {name: empty.copy() for name in ("size", "texture", "color", "shape", "shift")}
  present = empty.astype(bool)
  for place, *words in objects:
    at = RICH_WORLD.places.index(place)
    present[at] = True
    for name, word in zip(("size", "texture", "color", "shape"), words, strict=True):
      fields[name][at] = getattr(RICH_WORLD, f"{name}s").index(word)
  return Scene(RICH_WORLD, present=present, background=np.array(scenes.BACKGROUNDS.index("teal")), **fields)


TWO = make(("top-left", "large", "striped", "red", "circle"), ("center", "small", "solid", "pink", "bar"))


def test_the_canonical_caption():
  assert phrases.full_caption(TWO) == (
    "teal background ; two objects ; top-left large striped red circle ; center small solid pink bar ; "
    "red circle left-of pink bar ;"
  )


@pytest.mark.parametrize(
  "caption, right, claimed",
  [
    ("the background is teal ;", 1, 1),
    ("there are two objects ;", 1, 1),
    ("three objects ;", 0, 1),
    ("two objects ; two things ;", 1, 2),
    ("a big lined red disc at upper-left ;", 5, 5),
    ("upper-left : tiny red disc , lined ;", 4, 5),
    ("middle filled bar , pink and little ;", 5, 5),
    ("center solid bar , blue and small ;", 4, 5),
    ("red circle above pink bar ;", 0, 0),  # true: neither for nor against
    ("pink bar above red circle ;", 0, 1),
    ("red circle same-size-as pink bar ;", 0, 1),
    ("red circle left-of green cross ;", 0, 3),  # there is no green cross
    ("left-of ;", 0, 1),
    ("a the at , and ;", 0, 0),
    ("background ;", 0, 1),
    ("hello world ;", 0, 2),
  ],
)
def test_scores(caption, right, claimed):
  found = score(caption, TWO)
  assert (found.num_right, found.num_claimed, found.num_true) == (right, claimed, 12)
  assert [word for word, _ in found.words] == caption.split()
  assert len(found.missing) == 12 - right


def test_partial_captions_are_true_and_shorter():
  scene, rows = world(500), np.arange(500)
  texts = phrases.captions_text(scene, "partial", Draws(rows, 2))
  figures = aggregate([score(text, scene[row]) for row, text in enumerate(texts)])
  assert figures["caption_precision"] == 1 and 0.4 < figures["caption_recall"] < 0.75
  with pytest.raises(ValueError, match="needs draws"):
    phrases.captions_text(scene, "partial")


def test_the_processor_must_know_the_words():
  data = DataOptions(variant="rich", image_px=48, caption_tokens=61)
  source = open_source(data, "train")
  with pytest.raises(ValueError, match="rich_scenes"):
    source.batch_maker(processor_of(make_tokenizer()), 61, "full", 0)
  known = processor_of(make_tokenizer(RICH.words))
  batch = source.batch_maker(known, 61, "full", 0)(np.array([[0, 3], [1, 4]]))
  assert batch["image"].shape == (2, 48, 48, 3) and batch["tokens"].shape == (2, 61)
  assert score(known.caption_text(batch["tokens"][0]), scenes.scene(3, "train", RICH_WORLD)).recall == 1
  with pytest.raises(ValueError, match="caption_tokens = 60"):
    source.batch_maker(known, 60, "full", 0)(np.array([[0, 3]]))
