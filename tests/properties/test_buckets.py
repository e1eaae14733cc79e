"""Buckets: the nearest aspect ratio, batches of one bucket, every record once per epoch, exact resume, bad pictures."""

from collections import Counter
import dataclasses
from fractions import Fraction
import json

import numpy as np
from PIL import Image
import pytest

from tests.processors import processor_of
from uae_jax.data import buckets as buckets_lib
from uae_jax.data import stored_index
from uae_jax.data.bucket_order import proportions, turn
from uae_jax.data.buckets import assign, cropped, fit, header_size, nearest_buckets
from uae_jax.data.pipeline import make_dataset, repartition
from uae_jax.data.sources import open_source
from uae_jax.options import DataOptions
from uae_jax.small_world.processor import make_tokenizer

PROCESSOR = processor_of(make_tokenizer())
SIZES = ("32x32", "16x32", "48x16")
# (height, width) -> number of pictures; none of the counts divides by the batch size.
SHAPES = {(40, 40): 11, (30, 64): 7, (90, 30): 5}


def write_pictures(folder, shapes=SHAPES) -> None:
  folder.mkdir(exist_ok=True)
  number = 0
  for (height, width), count in shapes.items():
    for _ in range(count):
      Image.new("RGB", (width, height), (number * 7 % 256,) * 3).save(folder / f"{number * 13 % 101:03d}.png")
      number += 1


@pytest.fixture
def data(tmp_path) -> DataOptions:
  write_pictures(tmp_path / "photos")
  return DataOptions(source=f"folder:{tmp_path}/photos", image_px=16, buckets=SIZES, caption_tokens=8)


def dataset(data, **options):
  defaults = dict(captions="full", batch_size=4, seed=0, num_threads=0)
  return make_dataset(open_source(data, "train"), data, PROCESSOR, **(defaults | options))


def take(batches, count):
  iterator = iter(batches)
  return [next(iterator) for _ in range(count)]


def columns(batches) -> list:
  return [(batch["image"].shape[1:3], batch["index"].tolist()) for batch in batches]


# --- Turns ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rates", [[1], [1, 1, 1], [11, 7, 5], [1, 1000], [3, 2, 3], [999983, 7, 500000]])
def test_streams_take_turns_in_proportion(rates):
  elements = [turn(rates, k) for k in range(min(2 * sum(rates), 400))]
  expected = sorted((Fraction(j + 1, rate), i, j) for i, rate in enumerate(rates) for j in range(min(2 * rate, 400)))
  assert elements == [(i, j) for _, i, j in expected[: len(elements)]]


def test_proportions_are_exact():
  assert proportions([Fraction("0.7"), Fraction("0.3") / 2]) == [14, 3]


# --- Which bucket -----------------------------------------------------------------------------------------------------


def test_a_picture_goes_where_least_is_cropped():
  sizes = ((32, 32), (16, 32), (48, 16))
  pictures = np.asarray([(40, 40), (10, 19), (300, 100), (100, 71), (71, 100), (10, 5)])
  nearest, crop = nearest_buckets(pictures, sizes)
  crops = [[cropped(h, w, size) for size in sizes] for h, w in pictures.tolist()]
  assert nearest.tolist() == [int(np.argmin(row)) for row in crops]
  np.testing.assert_allclose(crop, np.min(crops, axis=1))


@pytest.mark.parametrize("picture", [(30, 40), (300, 41), (17, 90)])
@pytest.mark.parametrize("size", [(32, 32), (16, 32), (48, 16)])
def test_a_picture_fills_its_bucket(picture, size):
  """Of a picture whose pixels hold their coordinates, the center is kept, and as much as `cropped` says."""
  height, width = picture
  rows, columns = np.mgrid[:height, :width]
  image = np.stack([rows * 255 / height, columns * 255 / width, 0 * rows], -1).astype(np.uint8)
  for result in (fit(image, size), fit(image, (36, 36), size)):
    spans = [float(np.ptp(result[..., axis].astype(float))) / 255 for axis in range(2)]
    assert (1 - spans[0] * spans[1]) == pytest.approx(cropped(*picture, size), abs=0.16)
    assert result[..., :2].astype(float).mean((0, 1)) == pytest.approx([127, 127], abs=8)


def test_headers_are_read_upright(tmp_path):
  exif = Image.Exif()
  exif[buckets_lib.ORIENTATION] = 6
  Image.new("RGB", (64, 30)).save(tmp_path / "a.jpg", exif=exif)
  Image.new("RGB", (64, 30)).save(tmp_path / "b.png")
  source = open_source(DataOptions(source=f"folder:{tmp_path}"), "train")
  assert [header_size(source, i) for i in range(2)] == [(64, 30), (30, 64)]
  assert [header_size(source, i) for i in range(2)] == [source[i]["image"].shape[:2] for i in range(2)]


# --- Batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_is_of_one_bucket_and_an_epoch_has_every_record_once(data):
  source = open_source(data, "train")
  buckets = assign(source, data)
  assert buckets.counts == {"32x32": 11, "16x32": 7, "48x16": 5}
  # After four epochs no bucket has records left over.
  batches = take(dataset(data), 23)
  for batch in batches:
    (bucket,) = set(buckets.of[batch["index"]].tolist())
    assert batch["image"].shape == (4, *buckets.sizes[bucket], 3)
  assert Counter(i for batch in batches for i in batch["index"].tolist()) == dict.fromkeys(range(23), 4)
  # Each epoch of a bucket is a permutation of it.
  for bucket, count in enumerate(buckets.counts.values()):
    stream = [i for batch in batches for i in batch["index"].tolist() if buckets.of[i] == bucket]
    epochs = [stream[k : k + count] for k in range(0, len(stream), count)]
    assert len(epochs) == 4 and all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert epochs[0] != epochs[1]
  assert columns(batches) != columns(take(dataset(data, seed=1), 23))


def test_an_epoch_of_whole_batches_has_every_record_once(tmp_path):
  write_pictures(tmp_path / "photos", {(40, 40): 12, (30, 64): 8, (90, 30): 4})
  data = DataOptions(source=f"folder:{tmp_path}/photos", buckets=SIZES, caption_tokens=8)
  batches = take(dataset(data), 12)
  for epoch in (batches[:6], batches[6:]):
    assert sorted(i for batch in epoch for i in batch["index"].tolist()) == list(range(24))


def test_one_square_bucket_is_the_old_square(data):
  square = dataclasses.replace(data, buckets=())
  one = dataclasses.replace(data, buckets=("16x16",), max_crop=0.9)
  for batch, other in zip(take(dataset(square), 8), take(dataset(one), 8), strict=True):
    assert all(np.array_equal(batch[name], other[name]) for name in batch)


@pytest.mark.parametrize("process_count", [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_processes(data, process_count):
  whole = columns(take(dataset(data), 12))
  parts = [take(dataset(data, process_index=p, process_count=process_count), 12) for p in range(process_count)]
  assert [
    (part[0]["image"].shape[1:3], sum((batch["index"].tolist() for batch in part), []))
    for part in zip(*parts, strict=True)
  ] == whole


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_resumes_exactly(data, num_workers):
  options = dict(num_workers=num_workers, num_threads=1)
  iterator = iter(dataset(data, **options))
  before = [next(iterator) for _ in range(5)]
  state = json.loads(json.dumps(iterator.get_state()))
  after = columns([next(iterator) for _ in range(7)])
  again = iter(dataset(data, **options))
  again.set_state(state)
  assert columns([next(again) for _ in range(7)]) == after
  assert columns(before) + after == columns(take(dataset(data), 12))


def test_another_number_of_processes_goes_on_where_the_run_stopped(data):
  iterators = [iter(dataset(data, process_index=p, process_count=2)) for p in range(2)]
  for iterator in iterators:
    for _ in range(5):
      next(iterator)
  again = iter(dataset(data))
  again.set_state(repartition(open_source(data, "train"), [iterator.get_state() for iterator in iterators], 1))
  assert columns([next(again) for _ in range(4)]) == columns(take(dataset(data), 9)[5:])


def test_the_captioner_sees_the_same_crop_in_its_own_grid(data):
  # Cells of 8 pixels, of which the processor of the small world wants as many pixels as 32 x 32 have.
  grids = {batch["image"].shape[1:3]: batch.get("captioner_image") for batch in take(dataset(data), 23)}
  assert grids.keys() == {(32, 32), (16, 32), (48, 16)}
  for size, images in grids.items():
    expected = PROCESSOR.resized_size(*size)
    assert (size if images is None else images.shape[1:3]) == expected


def test_prompts_go_to_the_buckets_in_turn(tmp_path):
  write_pictures(tmp_path / "photos", {(40, 40): 2})
  (tmp_path / "a.txt").write_text("".join(f"prompt {i}\n" for i in range(6)))
  data = DataOptions(
    source=f"mix:0.75*prompts:{tmp_path}/a.txt;0.25*folder:{tmp_path}/photos", buckets=SIZES, caption_tokens=8
  )
  source = open_source(data, "train")
  assert assign(source, data).of.tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
  indices = [i for batch in take(dataset(data), 16) for i in batch["index"].tolist()]
  assert sum(i < 6 for i in indices) == 48


# --- Bad pictures -----------------------------------------------------------------------------------------------------


def test_a_picture_that_no_bucket_takes_is_a_named_bad_record(data, tmp_path, caplog):
  Image.new("RGB", (400, 20)).save(tmp_path / "photos" / "panorama.png")
  (tmp_path / "photos" / "torn.png").write_bytes(b"\x89PNG")
  with pytest.raises(ValueError, match=r"max_bad_fraction"):
    dataset(data)
  caplog.clear()
  data, bad = dataclasses.replace(data, max_bad_fraction=0.1), set()
  batches = take(dataset(data, bad_indices=bad), 23)
  assert Counter(i for batch in batches for i in batch["index"].tolist()) == dict.fromkeys(range(23), 4)
  assert bad == {23, 24}
  assert "panorama.png (no bucket takes its 400 x 20 pixels: data.buckets 16x32 comes nearest and crops 90 %" in (
    caplog.text
  )
  assert "torn.png (" in caplog.text
  shares = [set(), set()]
  for process, share in enumerate(shares):
    dataset(data, bad_indices=share, process_index=process, process_count=2)
  assert shares == [{24}, {23}]


def test_an_unreadable_picture_is_replaced_by_the_next_of_its_bucket(data, tmp_path):
  source = open_source(data, "train")
  buckets = assign(source, data)
  index = int(np.flatnonzero(buckets.of == 2)[-1])
  path = source.content(index)[0]
  path.write_bytes(path.read_bytes()[:60])  # The header remains.
  bad: set[int] = set()
  data = dataclasses.replace(data, max_bad_fraction=0.1)
  counts = Counter(i for batch in take(dataset(data, bad_indices=bad), 23) for i in batch["index"].tolist())
  first = int(np.flatnonzero(buckets.of == 2)[0])
  assert bad == {index} and counts[index] == 0 and counts[first] == 8
  # Another size under the same name is noticed too.
  Image.new("RGB", (400, 20)).save(path)
  broken = dataclasses.replace(data, max_bad_fraction=0.0)
  with pytest.raises(ValueError, match="no bucket takes its 400 x 20"):
    take(make_dataset(
      source, broken, PROCESSOR, captions="full", batch_size=4, seed=0, num_threads=0, buckets=buckets
    ), 23)  # fmt: skip


def test_sizes_are_stored_and_what_could_not_be_read_is_tried_again(data, tmp_path, monkeypatch):
  monkeypatch.setattr(stored_index, "LEAST_SECONDS", 0.0)
  source = open_source(data, "train")
  path = source.content(3)[0]
  content = path.read_bytes()
  path.write_bytes(b"torn")
  assert assign(source, data).of[3] == buckets_lib.NO_BUCKET
  path.write_bytes(content)
  read = []
  original = buckets_lib.header_size
  monkeypatch.setattr(buckets_lib, "header_size", lambda source, i: read.append(i) or original(source, i))
  assert assign(source, data).of[3] >= 0
  assert read == [3]


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(buckets=("512",)), "buckets = '512': expected HEIGHTxWIDTH"),
    (dict(buckets=("0x16",)), "expected HEIGHTxWIDTH"),
    (dict(buckets=("16x32", "32x64")), "'32x64' has the aspect ratio of '16x32'"),
    (dict(max_crop=0.2), "max_crop = 0.2 does nothing with buckets = ()"),
    (dict(source="scenes", buckets=("16x32",)), "source = 'scenes' are all squares"),
  ],
)
def test_wrong_buckets_are_refused(changes, message):
  with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
    DataOptions(**({"source": "folder:x"} | changes))
