"""Mutated data and results: an error of the project that names the file, or they are read; see `test_fuzzed_files`.

Sources are opened and read as by the check before a run, which reports records that cannot be read as one error.
"""

import io
import json
from pathlib import Path
import random
import tarfile

import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.properties.synthetic_workdir import write_workdir
from tests.properties.test_fuzzed_files import COUNT, fuzz, mutate_bytes, mutate_json
from uae_jax.commands import status
from uae_jax.data import stored_index
from uae_jax.data.bad_records import describe
from uae_jax.data.images import read_image
from uae_jax.data.prompt_lines import read_lines
from uae_jax.data.sources import open_source
from uae_jax.evaluation import caption_judge, comparison, rows
from uae_jax.options import DataOptions, Experiment
from uae_jax.report.page import write_report
from uae_jax.report.progress import read_progress
from uae_jax.training.data_check import check_readable
from uae_jax.training.workdir import to_plain

pytestmark = pytest.mark.slow


def picture(kind: str = "PNG", **options) -> bytes:
  data = io.BytesIO()
  pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
  Image.fromarray(pixels).save(data, kind, **options)
  return data.getvalue()


def mutate_lines(content: bytes, rng: random.Random) -> bytes:
  """Mutates one line of a JSON lines file as JSON, or bytes anywhere."""
  if rng.random() < 0.3:
    return mutate_bytes(content, rng)
  lines = content.splitlines()
  place = rng.randrange(len(lines))
  return b"\n".join([*lines[:place], mutate_json(lines[place], rng), *lines[place + 1 :]]) + b"\n"


def read_source(source: str, folder: Path) -> None:
  opened = open_source(DataOptions(source=source), "train")
  len(opened)
  check_readable(opened, str(folder))


@pytest.mark.parametrize(
  ("kind", "options"),
  [
    ("PNG", {}),
    ("JPEG", {}),
    ("JPEG", {"progressive": True, "exif": Image.Exif()}),
    ("WEBP", {"lossless": True}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("GIF", {}),
  ],
  ids=("png", "jpeg", "progressive", "webp", "tiff", "gif"),
)
def test_pictures(tmp_path, kind, options):
  file = tmp_path / f"a.{kind.lower()}"
  file.write_bytes(picture(kind, **options))

  def read():
    try:
      read_image(file)
    except Exception as error:  # What the readers of many files count as the failure of one.
      raise ValueError(f"{file}: {describe(error)}") from error

  fuzz(file, mutate_bytes, read, tmp_path, least_refused=0.02)


def test_json_lines(tmp_path):
  (tmp_path / "a.png").write_bytes(picture())
  lines = [json.dumps({"image": "a.png", "caption": "a red cat"})] * 2
  (tmp_path / "a.jsonl").write_text("\n".join([*lines, ""]))

  def read():
    opened = open_source(DataOptions(source=f"jsonl:{tmp_path}/a.jsonl"), "train")
    for index in range(len(opened)):
      try:
        opened[index], opened.caption(index)
      except Exception as error:
        raise ValueError(f"{opened.key(index)}: {describe(error)}") from error

  fuzz(tmp_path / "a.jsonl", mutate_lines, read, tmp_path)


def test_parquet(tmp_path):
  table = pa.table({"image": [{"bytes": picture(), "path": "a.png"}] * 3, "caption": ["a", "b", "c"]})
  pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
  read = lambda: read_source(f"parquet:{tmp_path}/a.parquet", tmp_path)  # noqa: E731
  fuzz(tmp_path / "a.parquet", mutate_bytes, read, tmp_path)


def test_tar(tmp_path):
  with tarfile.open(tmp_path / "a.tar", "w") as archive:
    for name, content in (("0.png", picture()), ("0.txt", b"a red cat"), ("1.png", picture()), ("1.json", b'{"a": 1}')):
      member = tarfile.TarInfo(name)
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))
  read = lambda: read_source(f"webdataset:{tmp_path}/a.tar", tmp_path)  # noqa: E731
  fuzz(tmp_path / "a.tar", mutate_bytes, read, tmp_path, least_refused=0.02)


def test_array_record(tmp_path):
  from array_record.python.array_record_module import ArrayRecordWriter

  from uae_jax.data import records

  writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
  for _ in range(3):
    writer.write(records.pack({"caption": "a red cat"}, picture()))
  writer.close()
  read = lambda: read_source(f"arrayrecord:{tmp_path}/a.array_record", tmp_path)  # noqa: E731
  fuzz(tmp_path / "a.array_record", mutate_array_record, read, tmp_path, least_refused=0.02)


def mutate_array_record(content: bytes, rng: random.Random) -> bytes:
  """Mutates the records at the beginning or the footer at the end; the space between them is empty."""
  if rng.random() < 0.5:
    return mutate_bytes(content[:8000], rng)[:8000].ljust(8000, b"\0") + content[8000:]
  return content[:-2000] + mutate_bytes(content[-2000:], rng)


def test_prompt_files(tmp_path):
  (tmp_path / "a.jsonl").write_text('{"prompt": "a red cat"}\n{"caption": "a dog"}\n')

  def read():
    for line in read_lines(tmp_path / "a.jsonl"):
      try:
        line.prompt()
      except ValueError as error:
        raise ValueError(f"{line}: {error}") from error

  fuzz(tmp_path / "a.jsonl", mutate_lines, read, tmp_path)


def test_stored_indexes(tmp_path, monkeypatch):
  """A damaged index is built again: whatever happens to it, the records are the same."""
  monkeypatch.setattr(stored_index, "LEAST_SECONDS", -1.0)
  (tmp_path / "a.jsonl").write_text("".join(f'{{"image": "a.png", "caption": "{i}"}}\n' for i in range(20)))
  source = f"jsonl:{tmp_path}/a.jsonl"
  open_source(DataOptions(source=source), "train")
  folder = next(path for path in (tmp_path / stored_index.FOLDER).iterdir() if path.is_dir())
  for name in ("spans.npy", "line_numbers.npy", "stamps.json"):

    def read():
      opened = open_source(DataOptions(source=source), "train")
      assert [opened.caption(i) for i in range(len(opened))] == [str(i) for i in range(20)]

    fuzz(folder / name, mutate_bytes, read, tmp_path, least_refused=0, count=COUNT // 10)


@pytest.mark.parametrize("name", ["results.json", "items.jsonl", "captions.jsonl"])
def test_results(tmp_path, name):
  scores = {"overall": 0.5, "categories": {"a": 0.5}, "items": {"0": 1.0}, "notes": [], "scale": 1.0}
  settings = {"suite": "geneval", "prompts": "p", "weights": "w", "seed": 0, "samples": 4, "guidance": 1.5}
  result = {"version": 1, "settings": settings, "files": 4, "failed": {}, "scores": scores}
  row = {"key": "a", "caption": "b", "files": []}
  contents = {
    "results.json": json.dumps(result),
    "items.jsonl": f"{json.dumps(row)}\n" * 2,
    "captions.jsonl": '{"image": "a.png", "caption": "a"}\n{"image": "b.png", "caption": "a"}\n',
  }
  (tmp_path / name).write_text(contents[name])
  readers = {
    "results.json": lambda: comparison.read(tmp_path / name).by_metric(),
    "items.jsonl": lambda: rows.whole(tmp_path),
    "captions.jsonl": lambda: caption_judge.read_captions(tmp_path / name),
  }
  fuzz(tmp_path / name, mutate_json if name == "results.json" else mutate_lines, readers[name], tmp_path)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "starts.jsonl"])
def test_status_of_a_run(tmp_path, name):
  line = {"stage": "pretrain", "step": 3, "round": 0, "seconds_step": 0.5, "useful_seconds": 2.0, "loss": 1.0}
  (tmp_path / "config.json").write_text(json.dumps(to_plain(Experiment())))
  (tmp_path / "metrics.jsonl").write_text(f"{json.dumps(line)}\n" * 3)
  (tmp_path / "starts.jsonl").write_text('{"time": 1e9, "num_processes": 1}\n')
  mutate = mutate_json if name == "config.json" else mutate_lines
  fuzz(tmp_path / name, mutate, lambda: status.row(read_progress(tmp_path)), tmp_path, least_refused=0)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "evaluation/cold_start.json"])
def test_report_of_a_run(tmp_path, name):
  write_workdir(tmp_path, items=1)
  mutate = mutate_lines if name == "metrics.jsonl" else mutate_json
  fuzz(tmp_path / name, mutate, lambda: write_report(tmp_path), tmp_path, least_refused=0, count=COUNT // 10)
