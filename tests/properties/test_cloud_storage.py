"""Addresses gs://BUCKET/NAME, against a server of objects on this machine."""

import fcntl
import glob
import io
import json
import os
import sys
import tarfile

from array_record.python.array_record_module import ArrayRecordWriter
import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.object_store import served
from tests.processors import processor_of
from tests.properties.test_operations import write_run
from uae_jax import cli, cloud_storage, embedders
from uae_jax.commands import command_line
from uae_jax.data.pipeline import make_dataset
from uae_jax.data.sources import open_source
from uae_jax.options import DataOptions, new_config, read_config
from uae_jax.small_world.processor import make_tokenizer, write_processor
from uae_jax.training import initial


@pytest.fixture(name="store")
def fixture_store(monkeypatch, tmp_path):
  with served(monkeypatch, tmp_path) as store:
    yield store


def read(path):
  with open(path, "rb") as file:
    return file.read()


def test_an_object_is_copied_once_and_again_when_it_changes(store):
  store.put("a/x.bin", b"one")
  copies = [read(cloud_storage.fetched("gs://pictures/a/x.bin")) for _ in range(2)]
  assert copies == [b"one", b"one"] and store.downloads == ["a/x.bin"]
  store.put("a/x.bin", b"two")
  assert read(cloud_storage.fetched("gs://pictures/a/x.bin")) == b"two"


def test_what_a_killed_download_left_is_removed_and_a_running_download_is_not(store, tmp_path):
  store.put("a/b/x", b"content")
  folder = tmp_path / "cache" / "gs" / "pictures" / "a"
  (folder / "b").mkdir(parents=True)
  torn, running = folder / "b" / ".4-5.tmp", folder / ".6-7.tmp"
  torn.write_bytes(b"cont")
  with running.open("wb") as held:
    fcntl.flock(held, fcntl.LOCK_EX)
    cloud_storage.fetched("gs://pictures/a")
    assert running.exists() and not torn.exists()
  cloud_storage.fetched("gs://pictures/a/*/x")
  assert not running.exists() and read(folder / "b" / "x") == b"content"


def test_a_folder_is_what_the_bucket_has_now(store):
  for name in ("a/x", "a/b/y", "ab"):
    store.put(name, name.encode())
  folder = cloud_storage.fetched("gs://pictures/a/")
  assert sorted(os.listdir(folder)) == ["b", "x"] and read(f"{folder}/b/y") == b"a/b/y"
  del store.objects["a/x"]
  assert os.listdir(cloud_storage.fetched("gs://pictures/a")) == ["b"]


def test_a_glob_stays_a_glob(store):
  for name in ("a/1.tar", "a/2.tar", "a/1.txt"):
    store.put(name, b"-")
  pattern = cloud_storage.fetched("gs://pictures/a/*.tar")
  assert [os.path.basename(path) for path in sorted(glob.glob(pattern))] == ["1.tar", "2.tar"]
  assert sorted(store.downloads) == ["a/1.tar", "a/2.tar"]
  del store.objects["a/1.tar"]
  assert len(glob.glob(cloud_storage.fetched("gs://pictures/a/*.tar"))) == 1


@pytest.mark.parametrize("fault", [503, 429, 500, -1])
def test_a_passing_fault_is_tried_again(store, fault):
  store.put("x", b"content")
  store.faults["x"] = [fault]
  assert read(cloud_storage.fetched("gs://pictures/x")) == b"content"


@pytest.mark.parametrize(
  ("address", "faults", "message"),
  [
    ("gs://pictures/no", {}, "gs://pictures/no: no such"),
    ("gs://nowhere/x", {}, "gs://nowhere/x: no such"),
    ("gs://pictures/x", {"x": [403]}, r"gs://pictures/x: cannot be read \(OSError: Forbidden"),
    ("gs://pictures/x", {"": [403]}, r"gs://pictures/x: cannot be read \(OSError: Forbidden"),
    ("gs://pictures/x", {"x": [404]}, "gs://pictures/x: no such object"),
    ("gs://", {}, "expected gs://BUCKET/NAME"),
    ("gs://pictures/../x", {}, "expected gs://BUCKET/NAME"),
  ],
)
def test_a_lasting_fault_is_one_line_and_leaves_nothing(store, tmp_path, address, faults, message):
  store.put("x", b"content")
  store.faults.update(faults)
  with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
    cloud_storage.fetched(address)
  assert "\n" not in str(error.value)
  assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file() and file.suffix != ".lock"]


def test_other_bytes_than_those_of_the_object_are_refused(store, monkeypatch):
  store.put("x", b"content")
  monkeypatch.setattr(store, "info", lambda name, info=store.info: info(name) | {"crc32c": "AAAAAA=="})
  with pytest.raises(ValueError, match="gs://pictures/x: what arrived is not the object"):
    cloud_storage.fetched("gs://pictures/x")


def test_the_package_that_is_missing_is_named(store, monkeypatch):
  monkeypatch.setitem(sys.modules, "gcsfs.core", None)
  with pytest.raises(ValueError, match=r"pip install 'uae_jax\[gcs\]'"):
    cloud_storage.fetched("gs://pictures/x")


def test_no_object_is_written_outside_of_the_copies(store, tmp_path):
  store.put("a/../../../../escaped", b"content")
  store.put("a/x", b"content")
  with pytest.raises(ValueError, match="rename it"):
    cloud_storage.fetched("gs://pictures/a")
  assert not list(tmp_path.rglob("escaped"))


# --- What is read from a bucket ---------------------------------------------------------------------------------------

COLORS = ("red", "lime", "blue")


def png(color):
  data = io.BytesIO()
  Image.new("RGB", (4, 4), color).save(data, "PNG")
  return data.getvalue()


def write_json_lines(folder, split):
  (folder / "images").mkdir(exist_ok=True)
  for color in COLORS:
    (folder / "images" / f"{color} 1.png").write_bytes(png(color))
  names = ("images/red 1.png", "images/lime%201.png", "gs://pictures/data/images/blue 1.png")
  lines = [json.dumps({"image": name, "caption": color}) for name, color in zip(names, COLORS, strict=True)]
  (folder / f"{split}.jsonl").write_text("\n".join(lines))


def write_folder(folder, split):
  (folder / split / "more").mkdir(parents=True)
  for number, color in enumerate(COLORS):
    stem = folder / split / ("more" if number else "") / f"{number}"
    stem.with_suffix(".png").write_bytes(png(color))
    stem.with_suffix(".txt").write_text(color)


def write_parquet(folder, split):
  for number, color in enumerate(COLORS):
    table = pa.table({"image": [png(color)], "caption": [color]})
    pq.write_table(table, folder / f"{split}-{number}.parquet")


def write_tar(folder, split):
  with tarfile.open(folder / f"{split}-0.tar", "w") as tar:
    for number, color in enumerate(COLORS):
      for name, content in ((f"{number}.png", png(color)), (f"{number}.txt", color.encode())):
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))


def write_array_record(folder, split):
  (folder / "red.png").write_bytes(png("red"))
  writer = ArrayRecordWriter(str(folder / f"{split}-0.array_record"), "group_size:1")
  for color in COLORS:
    writer.write(json.dumps({"image": "red.png", "caption": color}).encode())
  writer.close()


@pytest.mark.parametrize(
  ("write", "name"),
  [
    (write_json_lines, "jsonl:{split}.jsonl"),
    (write_folder, "folder:{split}"),
    (write_parquet, "parquet:{split}-*.parquet"),
    (write_tar, "webdataset:{split}-*.tar"),
    (write_array_record, "arrayrecord:{split}-*"),
  ],
)
def test_sources_in_a_bucket_have_the_records_of_local_ones(store, tmp_path, write, name):
  local = tmp_path / "local"
  local.mkdir()
  for split in ("train", "val"):
    write(local, split)
  store.upload(local, "data")
  kind, _, path = name.partition(":")
  for options in (
    DataOptions(source=f"{kind}:gs://pictures/data/{path}"),
    DataOptions(source=name, data_dir="gs://pictures/data"),
  ):
    for split in ("train", "held_out"):
      found = open_source(options, split)
      wanted = open_source(DataOptions(source=name, data_dir=str(local)), split)
      assert [found[i]["caption"] for i in range(3)] == [wanted[i]["caption"] for i in range(3)] == list(COLORS)
      assert all(np.array_equal(found[i]["image"], wanted[i]["image"]) for i in range(3))
      assert found.fingerprint() == wanted.fingerprint()
  assert len(store.downloads) == len(set(store.downloads))


def test_an_image_that_is_missing_in_the_bucket_is_a_bad_record(store, tmp_path):
  store.put("a.jsonl", b'{"image": "no.png"}\n{"image": "b.png"}\n')
  store.put("b.png", png("red"))
  store.faults["b.png"] = [403]
  source = open_source(DataOptions(source="jsonl:gs://pictures/a.jsonl"), "train")
  with pytest.raises(ValueError, match="no.png: no such file"):
    source[0]
  with pytest.raises(ValueError, match="gs://pictures/b.png: cannot be read"):
    source[1]
  assert source[1]["image"].shape == (4, 4, 3)


def test_data_that_are_not_in_the_bucket_are_named(store):
  for kind, name in (("jsonl", "no.jsonl"), ("parquet", "no-*"), ("folder", "no")):
    with pytest.raises(ValueError, match=f"data.source = '{kind}:gs://pictures/{name.replace('*', '.')}.*': gs://pict"):
      open_source(DataOptions(source=f"{kind}:gs://pictures/{name}"), "train")


def test_arguments_that_are_read_may_be_in_a_bucket(store, tmp_path, capsys):
  store.put("data/a.jsonl", json.dumps({"image": "b.png", "caption": "red"}).encode())
  store.put("data/b.png", png("red"))
  assert cli.main(["data", "inspect", "jsonl:a.jsonl", "--data-dir=gs://pictures/data"]) == 0
  assert "records" in capsys.readouterr().out
  assert command_line.input_path("gs://pictures/data").is_dir()
  with pytest.raises(SystemExit):
    cli.main(["caption", "--model=gs://pictures/no", "--images=x"])
  assert "gs://pictures/no: no such object or folder in the bucket" in capsys.readouterr().err


def test_processor_and_weights_are_read_from_a_bucket(store, tmp_path):
  write_processor(tmp_path / "processor")
  store.upload(tmp_path / "processor", "processor")
  config = new_config()
  config.processor = "gs://pictures/processor"
  initial.write_run_processor(read_config(config), tmp_path / "run")
  assert {file.name for file in (tmp_path / "run").iterdir()} == {
    file.name for file in (tmp_path / "processor").iterdir()
  }
  assert initial.weights_folder("gs://pictures/processor").is_dir()
  with pytest.raises(ValueError, match=r"config.init.weights = gs://pictures/no: no such object"):
    initial.weights_folder("gs://pictures/no")
  with pytest.raises(FileNotFoundError, match="gs://pictures/no: no such object"):
    embedders.load("clip", "gs://pictures/no")


def printed(argv, capsys):
  """Exit code, stdout and stderr of a command."""
  capsys.readouterr()  # what was said before, such as a progress bar
  code = cli.main(argv)
  return code, *capsys.readouterr()


def test_status_of_runs_in_a_bucket_is_that_of_local_ones(store, tmp_path, capsys):
  local = tmp_path / "runs"
  for steps in (20, 40):
    write_run(local / str(steps), steps)
    params = local / str(steps) / "checkpoints" / "pretrain" / "15" / "params"
    params.mkdir(parents=True)
    (params / "d").write_bytes(b"")
  with (local / "40" / "metrics.jsonl").open("r+b") as file:  # longer than what is read of it
    lines = file.read()
    file.seek(0)
    file.write(b'{"stage": "other", "step": 1, "round": 0}\n' * 30_000 + lines)
  store.upload(local, "runs")
  _, wanted, _ = printed(["status", "--json", str(local)], capsys)
  code, found, errors = printed(["status", "--json", "gs://pictures/runs/"], capsys)
  wanted, found = (
    [
      {name: value for name, value in run.items() if name not in ("idle_seconds", "goodput")}
      for run in json.loads(text)
    ]
    for text in (wanted, found)
  )
  assert (code, errors) == (0, "") and len(found) == 2 and found[0]["last_save"] == 15
  assert found == [
    run | {"workdir": f"gs://pictures/runs/{steps}"} for run, steps in zip(wanted, (20, 40), strict=True)
  ]
  assert {name.rpartition("/")[2] for name in store.downloads} == {"config.json", "starts.jsonl", "metrics.jsonl"}
  store.downloads.clear()
  code, found, _ = printed(["status", "gs://pictures/runs/40"], capsys)
  assert code == 0 and "gs://pictures/runs/40  evaluating  pretrain  40/" in found


def test_times_of_a_run_in_a_bucket_are_those_of_its_objects(store, tmp_path, capsys):
  write_run(tmp_path / "run", 20)
  store.upload(tmp_path / "run", "run")
  store.objects = {name: (content, generation - 30_000_000) for name, (content, generation) in store.objects.items()}
  (run,) = json.loads(printed(["status", "--json", "gs://pictures/run"], capsys)[1])
  assert run["idle_seconds"] == pytest.approx(30, abs=5)
  assert run["goodput"] == pytest.approx(20 * 2.0 / (100.0 - 30.0), rel=0.1)


def test_a_run_in_a_bucket_that_cannot_be_read_does_not_hide_the_others(store, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(cloud_storage, "OUTLINE_TIMEOUT_SECONDS", 0.5)
  write_run(tmp_path / "run", 20)
  store.upload(tmp_path / "run", "runs/run")
  store.put("runs/torn/config.json", b'{"seed": ')
  code, found, errors = printed(["status", "gs://pictures/runs", "gs://pictures/no", str(tmp_path)], capsys)
  assert code == 1 and found.count(" pretrain ") == 2
  assert errors.splitlines() == [
    "uae-jax status: error: gs://pictures/runs/torn/config.json: not JSON (Expecting value: line 1 column 10 (char 9))",
    "uae-jax status: error: gs://pictures/no: no such folder in the bucket",
  ]
  store.faults[""] = [-2]
  code, found, errors = printed(["status", "gs://pictures/runs"], capsys)
  assert (code, found) == (1, "") and errors.count("\n") == 1
  assert "gs://pictures/runs: cannot be read (it does not answer)" in errors


@pytest.mark.slow
def test_worker_processes_copy_images_themselves(store):
  lines = [json.dumps({"image": f"{number}.png", "caption": "red circle ;"}) for number in range(6)]
  store.put("a.jsonl", "\n".join(lines).encode())
  for number in range(6):
    store.put(f"{number}.png", png((number, 0, 0)))
  data = DataOptions(source="jsonl:gs://pictures/a.jsonl", image_px=8, caption_tokens=8)
  source, processor = open_source(data, "train"), processor_of(make_tokenizer())
  batches = make_dataset(source, data, processor, captions="full", batch_size=6, seed=0, num_workers=2, num_threads=1)
  found = next(iter(batches))
  assert sorted(found["index"].tolist()) == list(range(6)) and set(store.downloads) == set(store.objects)
