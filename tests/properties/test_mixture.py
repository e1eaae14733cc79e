"""Mixtures: proportions, every record of each source once an epoch of its own, exact for any number of processes."""

import json
import os

import numpy as np
from PIL import Image
import pytest

from tests.processors import processor_of
from uae_jax.data import pipeline
from uae_jax.data.pipeline import make_dataset
from uae_jax.data.sources import open_source
from uae_jax.evaluation import held_out
from uae_jax.options import DataOptions, new_config, read_config
from uae_jax.small_world.processor import make_tokenizer

SIZES, WEIGHTS = (7, 12), (0.25, 0.75)
PROCESSOR = processor_of(make_tokenizer())


@pytest.fixture
def data(tmp_path):
  """Two folders with 7 and 12 images, in the proportion 1 to 3."""
  for part, size in enumerate(SIZES):
    for split in ("train", "held_out"):
      (tmp_path / f"{part}" / split).mkdir(parents=True)
      for i in range(size):
        Image.new("RGB", (8, 8), (part, i, 0)).save(tmp_path / f"{part}" / split / f"{i:03d}.png")
  parts = [f"{weight}*folder:{tmp_path}/{part}/{{split}}" for part, weight in enumerate(WEIGHTS)]
  return DataOptions(source="mix:" + ";".join(parts), image_px=8, caption_tokens=8)


def batches(data, seed=0, **options):
  defaults = dict(captions="full", batch_size=4, seed=seed, num_threads=0)
  return iter(make_dataset(open_source(data, "train"), data, PROCESSOR, **(defaults | options)))


def indices(data, count, **options):
  iterator = batches(data, **options)
  return np.concatenate([next(iterator)["index"] for _ in range(count)])


def test_proportions_and_epochs_of_each_source(data):
  order = indices(data, 84)
  first = order[order < SIZES[0]]
  assert len(first) == 84 and np.sum(order[:40] < SIZES[0]) == 10
  for rows, low, size in ((first, 0, 7), (order[order >= SIZES[0]], 7, 12)):
    epochs = rows[: len(rows) // size * size].reshape(-1, size)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(low, low + size), (len(epochs), 1)))
    assert list(epochs[0]) != list(epochs[1])
  assert list(order) == list(indices(data, 84)) != list(indices(data, 84, seed=1))


def test_records_are_those_of_the_sources(data):
  batch = next(batches(data))
  for image, index in zip(batch["image"], batch["index"].tolist(), strict=True):
    part = int(index >= SIZES[0])
    assert tuple(image[0, 0]) == (part, index - SIZES[0] * part, 0)
  source = open_source(data, "train")
  assert source.key(8).endswith("/1/train/001.png") and source.caption(8) == ""


@pytest.mark.parametrize("process_count", (2, 4))
def test_the_batches_do_not_depend_on_the_number_of_processes(data, process_count):
  parts = [batches(data, process_index=p, process_count=process_count) for p in range(process_count)]
  rows = np.concatenate([next(part)["index"] for _ in range(8) for part in parts])
  np.testing.assert_array_equal(rows, indices(data, 8))


@pytest.mark.parametrize(("before", "after"), ((1, 1), (2, 2), (2, 1), (1, 4)))
def test_resume_at_random_moments(data, before, after):
  expected = indices(data, 24).reshape(24, 4)
  for moment in np.random.default_rng(0).permutation(20)[:4].tolist():
    old = [batches(data, process_index=p, process_count=before) for p in range(before)]
    for _ in range(moment):
      for part in old:
        next(part)
    states = [json.loads(json.dumps(part.get_state())) for part in old]
    state = pipeline.repartition(open_source(data, "train"), states, after)
    new = [batches(data, process_index=p, process_count=after) for p in range(after)]
    for p, part in enumerate(new):
      part.set_state(states[p] if before == after else state)
    found = [np.concatenate([next(part)["index"] for part in new]) for _ in range(3)]
    np.testing.assert_array_equal(found, expected[moment : moment + 3])


def test_the_held_out_split_is_of_all_sources_in_proportion(data):
  source = open_source(data, "held_out")
  parts = [source[i]["image"][0, 0, 0] for i in range(19)]
  assert sorted(parts) == [0] * 7 + [1] * 12 and sum(parts[:8]) == 6
  only = DataOptions(source=data.source.replace("/0/{split}", "/0/train"), image_px=8)
  assert len(open_source(only, "held_out")) == 12


def test_weights_are_part_of_what_the_data_are(data):
  other = DataOptions(source=data.source.replace("0.25", "0.5"))
  prints = [open_source(made, "train").fingerprint() for made in (data, other)]
  assert prints[0] != prints[1] and prints[0]["source 2, records"] == 12


@pytest.mark.parametrize(
  ("source", "message"),
  [
    ("mix:0.5*folder:a;folder:b", "'folder:b': expected WEIGHT"),
    ("mix:0*folder:a;1*folder:b", r"'0\*folder:a': expected WEIGHT"),
    ("mix:nan*folder:a", "expected WEIGHT"),
    ("mix:1*folder:a;2*folder:a", "named twice"),
    ("mix:1*scenes;2*folder:a", "scenes cannot be part"),
    ("mix:1*folder:s3://bucket/a", "an address"),
    ("mix:", "expected WEIGHT"),
  ],
)
def test_what_is_no_mixture_is_refused(source, message):
  with pytest.raises(ValueError, match=f"^source = .*{message}"):
    DataOptions(source=source)


def test_names_of_fields_hold_for_the_parts_that_have_fields(data, tmp_path):
  (tmp_path / "a.jsonl").write_text('{"image": "0/train/000.png", "long": "red circle ;"}\n')
  source = f"{data.source};1*jsonl:{tmp_path}/a.jsonl"
  found = open_source(DataOptions(source=source, caption_field="long", caption_choice="longest"), "train")
  assert (found.caption(0), found.caption(19)) == ("", "red circle ;")


def test_a_part_that_is_missing_is_named(data):
  with pytest.raises(ValueError, match="nowhere: no such folder"):
    open_source(DataOptions(source=f"{data.source};1*folder:nowhere"), "train")


def test_a_mixture_with_prompts_has_no_images(data, tmp_path):
  (tmp_path / "a.jsonl").write_text('{"prompt": "red circle ;", "tag": "x"}\n')
  made = new_config()
  made.data.source = f"{data.source};1*prompts:{tmp_path}/a.jsonl"
  with pytest.raises(ValueError, match="need images"):
    read_config(made)
  source = open_source(DataOptions(source=made.data.source), "train")
  assert source.metadata(19) == {"tag": "x"} and source.metadata(0) == {}


def test_home_folders_are_expanded():
  assert (
    DataOptions(source="mix:1*folder:~/a;2*jsonl:b").source == f"mix:1.0*folder:{os.path.expanduser('~/a')};2.0*jsonl:b"
  )


def test_held_out_figures_are_known_per_source(data):
  split = held_out.load(data, PROCESSOR, 8)["held_out"]
  # The red value of a picture is the number of its source.
  assert split.sources == tuple(split.images[:, 0, 0, 0].tolist()) and set(split.sources) == {0, 1}
  values = np.where(split.images[:, 0, 0, 0] == 0, 3.0, 5.0)
  assert split.by_source("psnr", values) == {"source_1_psnr": 3.0, "source_2_psnr": 5.0}
  assert split.first(3).sources == split.sources[:3]
