"""Parquet and WebDataset: what shards contain is read or refused by name; stored indexes are used and renewed."""

import base64
import dataclasses
import io
import json
import os
import pickle
import tarfile

from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.processors import processor_of
from uae_jax.data import stored_index
from uae_jax.data.pipeline import make_dataset
from uae_jax.data.sources import open_source
from uae_jax.options import DataOptions, new_config, read_config
from uae_jax.small_world.processor import make_tokenizer

pytestmark = pytest.mark.fast


def png(color="red") -> bytes:
  file = io.BytesIO()
  Image.new("RGB", (8, 8), color).save(file, "PNG")
  return file.getvalue()


def parquet(folder, rows, name="train-0.parquet", schema=None, **options):
  pq.write_table(pa.Table.from_pylist(rows, schema), folder / name, **options)


def shard(folder, *members, name="train-0.tar"):
  with tarfile.open(folder / name, "w") as tar:
    for member, data in members:
      info = tarfile.TarInfo(member)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  return folder / name


def source(folder, kind, split="train", **data):
  suffix = {"parquet": "parquet", "webdataset": "tar"}[kind]
  return open_source(DataOptions(source=f"{kind}:{folder}/{{split}}-*.{suffix}", **data), split)


# --- Parquet ----------------------------------------------------------------------------------------------------------


def test_images_of_parquet_columns(tmp_path):
  (tmp_path / "a.png").write_bytes(png())
  images = {
    "bytes": png(),
    "struct": {"bytes": png(), "path": "other.png"},
    "path in struct": {"bytes": None, "path": "a.png"},
    "path": "a.png",
    "list": [png()],
    "base64": "data:image/png;base64," + base64.b64encode(png()).decode(),
  }
  for name, image in images.items():
    parquet(tmp_path, [{"image": image, "text": "red"}])
    record = source(tmp_path, "parquet")[0]
    assert tuple(record["image"][0, 0]) == (255, 0, 0) and record["caption"] == "red", name


def test_rows_over_files_and_row_groups(tmp_path):
  for file in range(3):
    rows = [{"image": png((file, row, 0)), "caption": f"{file} {row}"} for row in range(7)]
    parquet(tmp_path, rows, f"train-{file}.parquet", row_group_size=3)
  found = source(tmp_path, "parquet")
  assert len(found) == 21
  for index in (20, 0, 6, 7, 13, 14, 3):
    file, row = divmod(index, 7)
    assert tuple(found[index]["image"][0, 0]) == (file, row, 0)
    assert found.caption(index) == f"{file} {row}"
    assert found.key(index) == f"{tmp_path}/train-{file}.parquet row {row}"
  assert pickle.loads(pickle.dumps(found))[20]["caption"] == "2 6"


def test_records_with_nulls_are_bad_and_others_are_read(tmp_path):
  rows = [
    {"image": {"bytes": None, "path": None}, "caption": ["a"]},
    {"image": None, "caption": ["a"]},
    {"image": {"bytes": b"", "path": None}, "caption": ["a"]},
    {"image": {"bytes": png(), "path": None}, "caption": None},
    {"image": {"bytes": png(), "path": None}, "caption": [None]},
    {"image": {"bytes": png(), "path": None}, "caption": ["a"]},
  ]
  parquet(tmp_path, rows)
  found = source(tmp_path, "parquet")
  messages = ["image = ", "image = null", "an empty file", "caption = null", r"caption = \[null\]"]
  for index, message in enumerate(messages):
    with pytest.raises(ValueError, match=message):
      found[index]
  assert found[5]["caption"] == "a"


def test_columns_are_named_by_the_config(tmp_path):
  parquet(tmp_path, [{"jpg": png(), "long": "a red square", "caption": "red"}])
  found = source(tmp_path, "parquet", image_field="jpg", caption_field="long")
  assert found[0]["caption"] == found.caption(0) == "a red square"
  with pytest.raises(ValueError, match=r"train-0.parquet: no column of images; it has jpg, long, caption: name one"):
    source(tmp_path, "parquet")
  with pytest.raises(ValueError, match=r"no column 'short' \(data.caption_field\); it has jpg, long, caption"):
    source(tmp_path, "parquet", image_field="jpg", caption_field="short")


def test_parquet_files_that_differ_or_are_torn_are_named(tmp_path):
  parquet(tmp_path, [{"image": png(), "caption": "red"}])
  for row, message in (
    ({"image": png(), "text": "red"}, "no column 'caption', which .*train-0.parquet has; it has image, text"),
    ({"image": png(), "caption": 3}, "column 'caption' is int64, in .*train-0.parquet it is string"),
  ):
    parquet(tmp_path, [row], "train-1.parquet")
    with pytest.raises(ValueError, match=f"train-1.parquet: {message}"):
      source(tmp_path, "parquet")
  whole = (tmp_path / "train-0.parquet").read_bytes()
  for content in (b"", whole[: len(whole) // 2], b"x" * 1000):
    (tmp_path / "train-1.parquet").write_bytes(content)
    with pytest.raises(ValueError, match="train-1.parquet is not a whole Parquet file .*: write it again"):
      source(tmp_path, "parquet")


def test_the_held_out_split_has_the_names_of_published_sets(tmp_path):
  for split in ("train", "validation", "test"):
    parquet(tmp_path, [{"image": png(), "caption": split}], f"{split}-0.parquet")
  assert source(tmp_path, "parquet", "held_out")[0]["caption"] == "validation"
  parquet(tmp_path, [{"image": png(), "caption": "ours"}], "held_out-0.parquet")
  assert source(tmp_path, "parquet", "held_out")[0]["caption"] == "ours"


# --- WebDataset -------------------------------------------------------------------------------------------------------


def test_members_are_paired_by_name(tmp_path):
  shard(
    tmp_path,
    ("a/1.txt", b"\xef\xbb\xbfone\r\n"),
    ("a/1.jpg", png("red")),
    ("b/1.png", png("blue")),
    ("3.webp", png("lime")),
    ("a/2.JPG", png("blue")),
    ("a/2.seg.png", png()),
    ("3.json", b'{"text": "three"}'),
    ("._4.png", b"x"),
    ("5.txt", b"no image"),
    ("b/1.json", b'{"caption": "json"}'),
    ("b/1.txt", b"text"),
  )
  found = source(tmp_path, "webdataset")
  captions = {found.key(i).split(" member ")[1]: found[i]["caption"] for i in range(len(found))}
  assert captions == {"a/1": "one", "b/1": "text", "3": "three", "a/2": ""}
  assert tuple(found[1]["image"][0, 0]) == (0, 0, 255)
  named = source(tmp_path, "webdataset", caption_field="caption", image_field="png")
  assert len(named) == 1 and named[0]["caption"] == "json"


def test_faulty_members_are_bad_records(tmp_path):
  shard(
    tmp_path,
    ("1.jpg", b""),
    ("1.txt", b"a"),
    ("2.jpg", png()),
    ("2.txt", b"a"),
    ("2.txt", b"b"),
    ("3.jpg", png()),
    ("3.png", png()),
    ("4.jpg", png()),
    ("4.json", b'{"caption": null}'),
    ("5.jpg", png()),
    ("5.txt", "é".encode("latin-1")),
    ("6.jpg", png()[:40]),
    ("7.jpg", png()),
  )
  found = source(tmp_path, "webdataset")
  several = "its shard has several images, .txt or .json members of this name"
  for index, message in enumerate(
    ("image member is empty", several, several, "caption = null", "not UTF-8", "cannot read the image of .*member 6")
  ):
    with pytest.raises(ValueError, match=message):
      found[index]
  assert found[6]["caption"] == ""


def test_shards_that_are_not_whole_are_named(tmp_path):
  path = shard(tmp_path, ("1.jpg", png() * 30), ("2.jpg", png() * 30), ("2.txt", b"a"))
  whole = path.read_bytes()
  end = whole.rindex(b"a" + bytes(511)) + 512  # of the last member
  damaged = bytearray(whole)
  damaged[whole.index(b"2.jpg")] ^= 1
  for content, message in (
    (b"", "is not a whole tar file"),
    (b"x" * 5000, "is not a whole tar file"),
    (whole[: end - 600], "is (torn|not a whole tar file)"),
    (whole[:900], "is (torn|not a whole tar file)"),
    (whole[:end], "is torn: it ends at byte"),
    (bytes(damaged), "is damaged at byte"),
    (whole + whole, "has more data after its end.*several joined shards"),
    (b"\x1f\x8b\x08" + whole, "is compressed by gzip"),
  ):
    (tmp_path / "train-1.tar").write_bytes(content)
    with pytest.raises(ValueError, match=f"train-1.tar {message}"):
      source(tmp_path, "webdataset")
  shard(tmp_path, ("a.txt", b"a"))
  (tmp_path / "train-1.tar").unlink()
  with pytest.raises(ValueError, match="no image .* among 1 members"):
    source(tmp_path, "webdataset")


# --- Prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_of_text_and_json_lines(tmp_path):
  (tmp_path / "a.txt").write_text("[red] circle ;\r\n\n  blue square ;\n")
  (tmp_path / "a.jsonl").write_text('{"tag": "x", "caption": "no", "prompt": "red circle ;"}\n{"text": "no prompt"}\n')
  lines = open_source(DataOptions(source=f"prompts:{tmp_path}/a.txt"), "train")
  assert [lines[i] for i in range(len(lines))] == [{"caption": "[red] circle ;"}, {"caption": "blue square ;"}]
  assert lines.metadata(0) == {}
  found = open_source(DataOptions(source=f"prompts:{tmp_path}/a.jsonl"), "train")
  assert found[0] == {"caption": "red circle ;"} and found.metadata(0) == {"tag": "x", "caption": "no"}
  with pytest.raises(ValueError, match="no field prompt; the record has text"):
    found[1]


def test_batches_of_prompts_have_black_images(tmp_path):
  (tmp_path / "a.txt").write_text("red circle ;\nblue square ;\n")
  data = DataOptions(source=f"prompts:{tmp_path}/a.txt", image_px=8, caption_tokens=8)
  processor = processor_of(make_tokenizer())
  batch = next(iter(make_dataset(open_source(data, "train"), data, processor, captions="full", batch_size=4, seed=0)))
  assert batch["image"].shape == (4, 8, 8, 3) and not batch["image"].any() and set(batch["index"]) == {0, 1}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({}, None),
    ({"reward_weights": (("clip_text", 1.0), ("http", 1.0))}, None),
    ({"stages": ("pretrain", "understanding_for_generation")}, "pretrain need images"),
    ({"captions": "sampled"}, "captions = 'sampled'.*set it to 'dataset'"),
    ({"conditioning": "answer"}, "conditioning = 'answer'.*set it to 'text'"),
    ({"reward_weights": (("http", 1.0), ("clip", 1.0))}, "reward_weights names clip, which compare with the original"),
    ({"held_out_embedder": "dinov2"}, "held_out_embedder = 'dinov2'"),
    ({"num_images": 4}, "evaluation.num_images = 4"),
  ],
)
def test_what_needs_images_is_refused_for_prompts(change, message):
  made = new_config()
  made.stages = change.get("stages", ("understanding_for_generation",))
  made.data.source = "prompts:a.txt"
  made.evaluation.num_images = change.get("num_images", 0)
  section = made.understanding_for_generation
  section.http_reward.url = "http://host"
  options = {"captions": "dataset", "reward_weights": (("http", 1.0),)} | change
  section.options.update({name: value for name, value in options.items() if name not in ("stages", "num_images")})
  if message is None:
    read_config(made)
    return
  with pytest.raises(ValueError, match=message):
    read_config(made)


# --- Several captions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ("parquet", "webdataset"))
def test_one_of_several_captions_is_chosen(tmp_path, kind):
  texts = ["large red circle ;", " ", "large red circle ; small blue square ;"]
  if kind == "parquet":
    parquet(tmp_path, [{"image": png(), "captions": texts}] * 8)
  else:
    record = json.dumps({"captions": texts}).encode()
    shard(tmp_path, *((f"{i}.{end}", data) for i in range(8) for end, data in (("png", png()), ("json", record))))
  longest = source(tmp_path, kind, caption_choice="longest")
  assert (source(tmp_path, kind).caption(0), longest.caption(0)) == (texts[0], texts[2])
  data = DataOptions(source=f"{kind}:x", image_px=8, caption_tokens=16, caption_choice="random")
  tokenizer = make_tokenizer()

  def lengths(seed, steps):
    found = source(tmp_path, kind, caption_choice="random")
    options = dict(captions="full", batch_size=8, seed=seed, num_threads=0)
    batches = iter(make_dataset(found, data, processor_of(tokenizer), **options))
    return [next(batches)["length"].tolist() for _ in range(steps)]

  first, again, other = lengths(0, 2), lengths(0, 2), lengths(1, 1)
  assert first == again and {length for batch in first for length in batch} == {5, 9}
  assert first[0] != first[1] and first[0] != other[0]


# --- Stored indexes ---------------------------------------------------------------------------------------------------


def test_an_index_is_stored_once_and_renewed_when_the_data_change(tmp_path, monkeypatch):
  monkeypatch.setattr(stored_index, "LEAST_SECONDS", 0.0)
  path = shard(tmp_path, ("1.jpg", png()), ("1.txt", b"one"))
  first = source(tmp_path, "webdataset")
  monkeypatch.setattr("uae_jax.data.webdataset_source._scan", None)  # A second scan would fail.
  again = source(tmp_path, "webdataset")
  assert again[0]["caption"] == "one" and again.fingerprint() == first.fingerprint()
  assert len(pickle.dumps(again)) < 2000 and pickle.loads(pickle.dumps(again))[0]["caption"] == "one"
  monkeypatch.undo()
  os.utime(path, ns=(1, 1))
  shard(tmp_path, ("1.jpg", png()), ("1.txt", b"two"), name="train-1.tar")
  assert [source(tmp_path, "webdataset").caption(i) for i in range(2)] == ["one", "two"]


@pytest.mark.parametrize("kind", ("jsonl", "folder"))
def test_indexes_of_lines_and_folders(tmp_path, monkeypatch, kind):
  monkeypatch.setattr(stored_index, "LEAST_SECONDS", 0.0)
  folder = tmp_path / "data"
  (folder / "sub").mkdir(parents=True)
  data = DataOptions(source=f"folder:{folder}" if kind == "folder" else f"jsonl:{folder}/train.jsonl")

  def add(name):
    (folder / f"{name}.png").write_bytes(png())
    (folder / f"{name}.txt").write_text(name)
    with open(folder / "train.jsonl", "a") as file:
      file.write(json.dumps({"image": f"{name}.png", "caption": name}) + "\n")

  def captions():
    found = open_source(data, "train")
    return [found[i]["caption"] for i in range(len(found))], found.fingerprint()

  add("a")
  add("sub/b")
  first = captions()
  assert first[0] == ["a", "sub/b"]
  kind_of_source = type(open_source(data, "train"))
  with monkeypatch.context() as patched:
    patched.setattr(kind_of_source, "_build", None)  # Building it again would fail.
    assert captions() == first
    assert len(pickle.dumps(open_source(data, "train"))) < 2000
  add("sub/c")
  changed = captions()
  assert changed[0] == ["a", "sub/b", "sub/c"] and changed[1] != first[1]


def test_a_damaged_index_is_built_again(tmp_path, monkeypatch):
  monkeypatch.setattr(stored_index, "LEAST_SECONDS", 0.0)
  shard(tmp_path, ("1.jpg", png()), ("1.txt", b"one"))
  damages = (
    lambda content: b"",
    lambda content: b"x" * 200,
    lambda content: content.replace(b"shape", b"sha(e"),
    lambda content: content[:-1] + bytes([content[-1] ^ 1]),
  )
  for damage in damages:
    source(tmp_path, "webdataset")
    for file in (tmp_path / stored_index.FOLDER).rglob("*.npy"):
      file.write_bytes(damage(file.read_bytes()))
    assert source(tmp_path, "webdataset").caption(0) == "one"


def test_an_index_can_be_elsewhere_or_nowhere(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(stored_index, "LEAST_SECONDS", 0.0)
  (tmp_path / "data").mkdir()
  (tmp_path / "index").mkdir()
  shard(tmp_path / "data", ("1.jpg", png()))
  assert len(source(tmp_path / "data", "webdataset", index_dir=str(tmp_path / "index"))) == 1
  assert list((tmp_path / "index").iterdir()) and not (tmp_path / "data" / stored_index.FOLDER).exists()
  (tmp_path / "file").write_text("")
  assert len(source(tmp_path / "data", "webdataset", index_dir=str(tmp_path / "file"))) == 1
  assert "data.index_dir names another place" in caplog.text


def test_field_names_do_nothing_for_folders():
  with pytest.raises(ValueError, match="caption_field = 'text' does nothing"):
    dataclasses.replace(DataOptions(source="folder:a"), caption_field="text")
