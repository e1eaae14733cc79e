"""One rule for captions and images of JSONL, ArrayRecord, TFDS and folders; odd files are read or refused by name."""

import base64
import json
import os
import socket

import numpy as np
from PIL import Image
import pytest

from uae_jax.data import tfds_source
from uae_jax.data.sources import open_source
from uae_jax.options import DataOptions

pytestmark = pytest.mark.fast


@pytest.fixture
def folder(tmp_path):
  Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
  return tmp_path


def source(kind, path, split="train"):
  return open_source(DataOptions(source=f"{kind}:{path}"), split)


def jsonl(folder, *lines):
  data = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines)
  (folder / "train.jsonl").write_bytes(data)
  return source("jsonl", folder / "train.jsonl")


def array_record(folder, *lines, name="train-0"):
  from array_record.python.array_record_module import ArrayRecordWriter

  writer = ArrayRecordWriter(str(folder / name), "group_size:1")
  for line in lines:
    writer.write(line.encode())
  writer.close()


# --- Captions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("fields", "caption"),
  [
    ('"caption": "a red square"', "a red square"),
    ('"text": "a"', "a"),
    ('"prompt": "a"', "a"),
    ('"captions": ["a", "b"]', "a"),
    ('"caption": ["a", 7]', "a"),
    ('"prompt": "Describe it.", "text": "b", "caption": "a"', "a"),
    ('"caption": "a\u2028\u0085b"', "a\u2028\u0085b"),
    (r'"caption": "\ud83d\ude00"', "\U0001f600"),
    ('"caption": ""', ""),
    ('"caption": " \\n"', ""),
    ('"label": 3', ""),
  ],
)
def test_captions_of_json_records(folder, fields, caption):
  line = '{"image": "a.png", ' + fields + "}"
  found = jsonl(folder, line)
  assert (found[0]["caption"], found.caption(0)) == (caption, caption)
  array_record(folder, line)
  found = source("arrayrecord", folder / "train-*")
  assert (found[0]["caption"], found.caption(0)) == (caption, caption)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ('"caption": null', "caption = null: expected text"),
    ('"caption": NaN', "caption = NaN: expected text"),
    ('"caption": 7', "caption = 7: expected text"),
    ('"caption": true', "caption = true: expected text"),
    ('"caption": {"en": "a"}', "caption = {"),
    ('"captions": []', r"captions = \[\]"),
    ('"captions": [null, "a"]', "captions = "),
    ('"caption": [["a"]]', "caption = "),
    (r'"caption": "a \ud800"', r"caption contains '\\ud800' at character 2"),
    ('"caption": "a", "caption": "b"', "field 'caption' occurs twice"),
  ],
)
def test_what_is_no_caption_is_refused(folder, fields, message):
  found = jsonl(folder, '{"image": "a.png", ' + fields + "}")
  with pytest.raises(ValueError, match=message):
    found[0]
  with pytest.raises(ValueError, match=message):
    found.caption(0)


@pytest.mark.parametrize("line", ["[1]", '"text"', "null", "{", '{"image": "a.png"} {}', "[" * 100_000, b"\xff"])
def test_what_is_no_object_is_refused(folder, line):
  with pytest.raises((ValueError, RecursionError)):
    jsonl(folder, '{"image": "a.png"}', line)[1]


@pytest.mark.parametrize(
  ("example", "caption"),
  [
    ({"caption": b"a"}, "a"),
    ({"text": "a"}, "a"),
    ({"captions": [b"a", b"b"]}, "a"),
    ({"captions": np.array([b"a", b"b"], object)}, "a"),
    ({"captions": {"text": [b"a", b"b"], "id": [np.int64(1), np.int64(2)]}}, "a"),
    ({"caption": {"text": b"a"}}, "a"),
    ({"label": 3}, ""),
  ],
)
def test_captions_of_tfds_examples(example, caption):
  assert tfds_source.caption_of(example) == caption


@pytest.mark.parametrize("value", [np.int64(3), np.float32(np.nan), {"en": b"a"}, [], b"\xff", np.zeros(2)])
def test_what_is_no_caption_is_refused_in_tfds_too(value):
  with pytest.raises(ValueError):
    tfds_source.caption_of({"caption": value})


def test_captions_beside_images(folder):
  for name, content in {
    "bom.txt": b"\xef\xbb\xbfred\r\n",
    "two.txt": "a\r\nb\u2028c".encode(),
    "upper.TXT": b"a",
    "kohya.caption": b"a",
    "blank.txt": b"  \n",
    "latin.txt": "é".encode("latin-1"),
  }.items():
    (folder / name).write_bytes(content)
    Image.new("RGB", (8, 8)).save(folder / f"{name.partition('.')[0]}.png")
  found = source("folder", folder)
  captions = {}
  for index in range(len(found)):
    try:
      captions[os.path.basename(found.key(index))] = found[index]["caption"]
    except ValueError as error:
      captions[os.path.basename(found.key(index))] = str(error)
  assert captions.pop("latin.png").endswith("latin.txt: not UTF-8 text (byte 0); expected a text file in UTF-8")
  expected = {"bom.png": "red", "two.png": "a\nb\u2028c", "upper.png": "a", "kohya.png": "a", "blank.png": ""}
  assert captions == expected | {"a.png": ""}


# --- Images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["image", "file_name", "image_path"])
@pytest.mark.parametrize("name", ["a.png", "{folder}/a.png", "sub/../a.png", "file://{folder}/my%20cat.png"])
def test_image_paths(folder, field, name):
  (folder / "sub").mkdir()
  Image.new("RGB", (8, 8), "red").save(folder / "my cat.png")
  name = name.replace("{folder}", str(folder))
  assert tuple(jsonl(folder, json.dumps({field: name}))[0]["image"][0, 0]) == (255, 0, 0)


@pytest.mark.parametrize("name", [r"sub\b.png", "sub/my%20cat.png", "sub/100%25.png", "sub/100%.png"])
def test_paths_of_other_systems(folder, name):
  (folder / "sub").mkdir()
  for file in ("b.png", "my cat.png", "100%.png"):
    Image.new("RGB", (8, 8), "red").save(folder / "sub" / file)
  assert jsonl(folder, json.dumps({"image": name}))[0]["image"].shape == (8, 8, 3)


def test_images_in_base64(folder):
  text = base64.b64encode((folder / "a.png").read_bytes()).decode()
  wrapped = base64.encodebytes((folder / "a.png").read_bytes()).decode()
  uri = f"data:image/png;base64,{text}"
  records_found = jsonl(
    folder, *(json.dumps({f: v}) for f, v in [("image_base64", text), ("image_base64", wrapped), ("image", uri)])
  )
  assert [tuple(records_found[i]["image"][0, 0]) for i in range(3)] == [(255, 0, 0)] * 3


@pytest.mark.parametrize(
  ("record", "message"),
  [
    ({"caption": "a", "url": "x"}, "no field image_base64, image, file_name, image_path; the record has caption, url"),
    ({"image": None}, "image = null"),
    ({"image": ""}, 'image = ""'),
    ({"image": ["a.png", "a.png"]}, "image = .*expected one image"),
    ({"image": {"bytes": "x"}}, "image = {.*expected one image"),
    ({"image": "https://host/a.png"}, "not on this disk"),
    ({"image": "s3://bucket/a.png"}, "not on this disk"),
    ({"image": "b.png"}, "b.png: no such file"),
    ({"image": "."}, "is a folder"),
    ({"image_base64": "!!"}, "cannot read the image in image_base64"),
    ({"image_base64": "aGVsbG8="}, "in image_base64: UnidentifiedImageError: .* begins with b'hello'"),
  ],
)
def test_records_without_one_image_are_refused(folder, record, message):
  with pytest.raises(ValueError, match=message):
    jsonl(folder, json.dumps(record))[0]


# --- Files ------------------------------------------------------------------------------------------------------------

LINE = '{"image": "a.png", "caption": "red"}'


@pytest.mark.parametrize(
  ("content", "lines"),
  [
    (f"\ufeff{LINE}\n", [1]),
    (f"{LINE}\r\n{LINE}\r\n\r\n", [1, 2]),
    (f"\n{LINE}\n  \t\n{LINE}", [2, 4]),
    (f"\ufeff\r\n{LINE}", [2]),
  ],
)
def test_json_lines_of_other_systems(folder, content, lines):
  found = jsonl(folder, content)
  assert [found.key(i) for i in range(len(found))] == [f"{folder}/train.jsonl line {number}" for number in lines]
  assert all(found[i]["caption"] == "red" for i in range(len(found)))


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "holds no record"),
    (b"\n \r\n", "holds no record"),
    (b"\xef\xbb\xbf", "holds no record"),
    (f"[{LINE}]".encode(), "a JSON array"),
    (f"  [\n{LINE}\n]".encode(), "a JSON array"),
    (LINE.encode("utf-16"), "UTF-16"),
    (b"\x1f\x8b\x08\x00", "gunzip"),
    (b"PAR1\x15\x04", "Parquet"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
  ],
)
def test_files_without_json_lines_are_named(folder, content, message):
  with pytest.raises(ValueError, match=rf"data\.source = 'jsonl:.*train\.jsonl.*{message}"):
    jsonl(folder, content)


def test_array_record_files_that_are_no_such_files_are_named(folder):
  for name, content in {"empty": b"", "torn": None, "text": b"x" * 200_000}.items():
    array_record(folder, *[LINE] * 3)
    whole = (folder / "train-0").read_bytes()
    (folder / f"train-1-{name}").write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError, match=rf"train-1-{name} is not a whole ArrayRecord file .*: write it again"):
      source("arrayrecord", folder / "train-*")
    (folder / f"train-1-{name}").unlink()
  array_record(folder, name="none-0")
  with pytest.raises(ValueError, match="none-0 holds no record"):
    source("arrayrecord", folder / "none-0")
  array_record(folder, LINE, name="train-1")
  found = source("arrayrecord", folder / "train-*")
  assert [found.key(i) for i in (2, 3)] == [f"{folder}/train-0 record 2", f"{folder}/train-1 record 0"]


@pytest.mark.parametrize("kind", ["jsonl", "arrayrecord"])
def test_pipes_and_folders_are_refused_at_once(folder, kind):
  os.mkfifo(folder / "pipe")
  with pytest.raises(ValueError, match="pipe is a named pipe"):
    source(kind, folder / "pipe")
  with pytest.raises(ValueError, match="is a folder"):
    source(kind, folder)
  with socket.socket(socket.AF_UNIX) as server:
    server.bind(str(folder / "s"))
    with pytest.raises(ValueError, match="s is a socket"):
      source(kind, folder / "s")
  with pytest.raises(ValueError, match="/dev/null is a device"):
    source(kind, "/dev/null")


def test_pipes_in_a_folder_are_bad_records(folder):
  os.mkfifo(folder / "b.png")
  os.mkfifo(folder / "a.txt")
  found = source("folder", folder)
  for index, name in enumerate(("a.txt", "b.png")):
    with pytest.raises(ValueError, match=f"{name} is a named pipe"):
      found[index]


def test_folders_with_links_and_hidden_files(folder):
  outside = folder.parent / f"{folder.name}_outside"
  outside.mkdir()
  for name in ("b.PNG", "c.tif", "d.gif", "._b.png"):
    Image.new("RGB", (8, 8)).save(outside / name, {"c": "TIFF", "d": "GIF"}.get(name[0], "PNG"))
  (folder / "link").symlink_to(outside)
  (folder / "loop").symlink_to(folder)
  (outside / "up").symlink_to(folder)
  (folder / ".ipynb_checkpoints").mkdir()
  Image.new("RGB", (8, 8)).save(folder / ".ipynb_checkpoints" / "a.png")
  found = source("folder", folder)
  assert [found.key(i) for i in range(len(found))] == [
    str(folder / name) for name in ("a.png", "link/b.PNG", "link/c.tif", "link/d.gif")
  ]
  assert all(found[i]["image"].shape == (8, 8, 3) for i in range(len(found)))


@pytest.mark.parametrize("content", [None, {}, {"a.txt": b"a"}])
def test_folders_without_images_are_named(tmp_path, content):
  path = tmp_path / "photos"
  if content is not None:
    path.mkdir()
  for name, data in (content or {}).items():
    (path / name).write_bytes(data)
  with pytest.raises(ValueError, match="photos: no (such folder|image)"):
    source("folder", path)


# --- Fingerprints -----------------------------------------------------------------------------------------------------


def test_fingerprints_tell_data_apart(folder):
  lines = [LINE, LINE.replace("red", "tan")]
  prints = [jsonl(folder, *content).fingerprint() for content in (lines, lines, lines[::-1], lines[:1], lines * 2)]
  assert prints[0] == prints[1] and len({str(found) for found in prints}) == 4
  assert [found["records"] for found in prints] == [2, 2, 2, 1, 4]

  array_record(folder, *lines)
  first = source("arrayrecord", folder / "train-*").fingerprint()
  array_record(folder, *lines[:1], name="train-1")
  assert first["records"] == 2 and source("arrayrecord", folder / "train-*").fingerprint()["records"] == 3

  first = source("folder", folder).fingerprint()
  (folder / "a.txt").write_text("red")
  second = source("folder", folder).fingerprint()
  (folder / "a.png").rename(folder / "b.png")
  third = source("folder", folder).fingerprint()
  assert first != second != third and third["records"] == 1 and (second["captions"], first["captions"]) == (1, 0)
