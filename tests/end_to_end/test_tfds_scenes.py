"""The small world, built to disk by its command and read with grain, equals the procedural source."""

import dataclasses
import functools
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pytest

from uae_jax.data.pipeline import make_dataset
from uae_jax.data.processing import Processor
from uae_jax.data.sources import open_source
from uae_jax.data.tfds_source import TFDSSource
from uae_jax.evaluation import held_out
from uae_jax.options import DataOptions
from uae_jax.small_world import phrases, processor, render, scenes, tfds

NUM_TRAIN, NUM_HELD_OUT = 250, 20
SCENES = DataOptions(image_px=32, caption_tokens=26)


@functools.cache
def small_processor() -> Processor:
  with tempfile.TemporaryDirectory() as folder:
    processor.write_processor(folder)
    return Processor.from_folder(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = str(tmp_path_factory.mktemp("tfds"))
  command = [sys.executable, "-m", "uae_jax.small_world.tfds", "--data_dir", folder]
  command += ["--num_train", str(NUM_TRAIN), "--num_held_out", str(NUM_HELD_OUT)]
  result = subprocess.run(command, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  assert f"--config.data.source=tfds:uae_scenes/plain --config.data.data_dir={folder}" in result.stdout
  return dataclasses.replace(SCENES, source="tfds:uae_scenes/plain", data_dir=folder)


def dataset(data, split="train", **options):
  defaults = dict(captions="full", batch_size=25, seed=0)
  return make_dataset(open_source(data, split), data, small_processor(), **(defaults | options))


def epoch(data, num_records, **options):
  iterator = iter(dataset(data, **options))
  batches = [next(iterator) for _ in range(num_records // options.get("batch_size", 25))]
  return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


@pytest.mark.parametrize(
  "split, count", (("train", NUM_TRAIN), ("held_out", NUM_HELD_OUT), ("held_out_pairs", NUM_HELD_OUT))
)
def test_an_epoch_is_the_first_scenes_of_the_split(data, split, count):
  found = epoch(data, count, split=split, batch_size=10)
  assert sorted(found["index"]) == list(range(count))
  expected = scenes.scenes(np.arange(count), split)
  images = render.render_batch(expected)
  captions = phrases.captions_text(expected, "full")
  # TFDS shuffles the records that it writes, so they are compared as sets.
  pairs = {(image.tobytes(), caption) for image, caption in zip(images, captions, strict=True)}
  texts = [small_processor().caption_text(row) for row in found["tokens"]]
  assert {(image.tobytes(), text) for image, text in zip(found["image"], texts, strict=True)} == pairs
  assert len(texts) == count


def test_partial_captions_differ_from_epoch_to_epoch(data):
  found = epoch(data, 2 * NUM_TRAIN, captions="partial")
  first, second = (
    dict(zip(found["index"][rows], found["tokens"][rows].tolist(), strict=True))
    for rows in (slice(NUM_TRAIN), slice(NUM_TRAIN, None))
  )
  assert set(first) == set(second)
  assert np.mean([first[index] != second[index] for index in first]) > 0.8


def test_contrastive_groups_start_with_the_stored_image(data):
  batch = next(iter(dataset(data, captions="contrastive")))
  assert batch["image"].shape == (25, 4, 32, 32, 3)
  objects, background = render.detect(batch["image"].reshape(100, 32, 32, 3))
  shown = scenes.Scene.from_array(np.concatenate([background[:, None], objects], 1), scenes.variant("plain"))
  np.testing.assert_array_equal(shown.identity().reshape(25, 4), batch["identity"])


def test_worker_processes_keep_order_and_state(data):
  plain = iter(dataset(data, captions="mixed"))
  expected = [next(plain) for _ in range(4)]
  workers = iter(dataset(data, captions="mixed", num_workers=2))
  found = [next(workers) for _ in range(2)]
  state = workers.get_state()
  workers.close()
  resumed = iter(dataset(data, captions="mixed", num_workers=2))
  resumed.set_state(state)
  found += [next(resumed) for _ in range(2)]
  resumed.close()
  for a, b in zip(found, expected, strict=True):
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


def test_reading_needs_no_tensorflow(data):
  code = (
    "import sys\n"
    "from uae_jax.data import pipeline, sources\n"
    "from uae_jax.options import DataOptions\n"
    "from uae_jax.small_world import processor, scenes, source, tfds\n"
    "assert not {'tensorflow', 'transformers', 'tensorflow_datasets'} & set(sys.modules)\n"
    f"data = DataOptions(source={data.source!r}, data_dir={data.data_dir!r})\n"
    "source = sources.open_source(data, 'train')\n"
    "source[0]\n"
    "assert 'tensorflow' not in sys.modules\n"
  )
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert result.returncode == 0, result.stderr


def test_what_is_there_is_left_alone_and_other_sizes_are_an_error(data):
  sizes = {"train": NUM_TRAIN, "held_out": NUM_HELD_OUT, "held_out_pairs": NUM_HELD_OUT}
  tfds.build(data.data_dir, sizes)
  with pytest.raises(ValueError, match="remove it or choose another"):
    tfds.build(data.data_dir, sizes | {"train": 300})


@pytest.mark.parametrize(
  "source, split, message",
  [
    ("tfds:uae_scenes/dense", "train", "no such dataset"),
    ("tfds:unheard_of", "train", r"data\.source = tfds:unheard_of"),
  ],
)
def test_missing_datasets_are_named(data, source, split, message):
  with pytest.raises(ValueError, match=message):
    dataset(dataclasses.replace(data, source=source), split=split)


def test_a_stored_split_describes_itself(data):
  source = open_source(data, "held_out")
  assert source.key(3) == "uae_scenes/plain held_out record 3" and source.caption(3) == source[3]["caption"] != ""
  assert set(source.fields()) == {"image", "caption", "scene", "index"}
  found = source.fingerprint()
  assert found["records"] == NUM_HELD_OUT and found != open_source(data, "train").fingerprint()
  assert found == open_source(data, "held_out").fingerprint()


def test_torn_and_missing_files_are_named(data, tmp_path):
  shutil.copytree(data.data_dir, tmp_path / "tfds")
  data = dataclasses.replace(data, data_dir=str(tmp_path / "tfds"))
  file = next((tmp_path / "tfds").rglob("*train.array_record*"))
  whole = file.read_bytes()
  for content in (whole[: len(whole) // 2], b"", None):
    file.unlink()
    if content is not None:
      file.write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.source = tfds:uae_scenes/plain: .*train\.array_record"):
      open_source(data, "train")
  assert len(open_source(data, "held_out")) == NUM_HELD_OUT


def test_features_that_do_not_exist_are_named(data):
  with pytest.raises(ValueError, match="no feature 'mask', only .*image.*scene"):
    TFDSSource("uae_scenes/plain", "train", data.data_dir, extra=("mask",))


@pytest.mark.parametrize(
  "image, corner",
  [
    (np.zeros((4, 4, 4), np.uint8), 255),
    (np.zeros((4, 4, 2), np.uint8), 255),
    (np.full((4, 4, 1), 32896, np.uint16), 128),
    (np.full((4, 4, 3), 0.5, np.float32), 128),
    (np.full((4, 4), 7, np.uint8), 7),
  ],
)
def test_images_are_those_of_other_sources(data, image, corner, monkeypatch):
  source = TFDSSource("uae_scenes/plain", "train", data.data_dir)
  monkeypatch.setattr(source, "_data", [{"image": image, "caption": b"a"}])
  np.testing.assert_array_equal(source[0]["image"], np.full((4, 4, 3), corner, np.uint8))


def test_another_variant_is_an_error(data):
  for variant in ("dense", "shifted"):
    other = dataclasses.replace(data, variant=variant, caption_tokens=34)
    with pytest.raises(ValueError, match=f"data.variant = '{variant}', but data.source = tfds:uae_scenes/plain"):
      dataset(other)


def held_out_of(data, count, tmp_path):
  processor.write_processor(tmp_path)
  return held_out.load(data, Processor.from_folder(tmp_path), count)


def test_stored_records_have_their_ground_truth(data, tmp_path):
  splits = held_out_of(data, NUM_HELD_OUT, tmp_path)
  assert list(splits) == ["held_out", "held_out_pairs"]
  for split, found in splits.items():
    assert found.figures(found.captions)["caption_recall"] == found.figures(found.captions)["caption_precision"] == 1
    assert found.truth.image_figures(found.images) == {"object_accuracy": 1.0, "scene_accuracy": 1.0}
    assert found.truth.image_figures(found.truth.edited_images())["scene_accuracy"] == 0
    # The same images as in the procedural source, in the order of the files.
    made = {image.tobytes() for image in held_out_of(SCENES, NUM_HELD_OUT, tmp_path)[split].images}
    assert {image.tobytes() for image in found.images} == made


def test_too_few_held_out_records_are_an_error(data, tmp_path):
  with pytest.raises(ValueError, match=rf"num_images = 21, but split held_out of .* has {NUM_HELD_OUT} records"):
    held_out_of(data, NUM_HELD_OUT + 1, tmp_path)
