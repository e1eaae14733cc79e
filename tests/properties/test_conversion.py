"""`uae-jax data`: a converted source has the same records; interrupted it goes on; unreadable records are honest."""

import fcntl
import io
import json

import numpy as np
from PIL import Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.properties.test_files import full_disk
from uae_jax import cli
from uae_jax.data import conversion
from uae_jax.data.sources import open_source
from uae_jax.options import DataOptions
from uae_jax.small_world.processor import write_processor

pytestmark = pytest.mark.fast

COUNT = 10


@pytest.fixture
def folder(tmp_path):
  """Ten images of different shapes, two held out, some with several captions, as JSON lines and as Parquet."""
  for split, count in (("train", COUNT), ("held_out", 2)):
    lines, rows = [], []
    for i in range(count):
      Image.new("RGB", (16 + 8 * i, 24), (i, 0, 0)).save(tmp_path / f"{split}{i}.png")
      captions = {"captions": [f"red circle {i}", "blue"]} if i % 2 else {"captions": [f"red circle {i}"]}
      lines.append(json.dumps({"image": f"{split}{i}.png", **captions}) + "\n")
      rows.append({"image": {"bytes": (tmp_path / f"{split}{i}.png").read_bytes(), "path": None}, **captions})
    (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{split}.parquet", row_group_size=3)
  return tmp_path


def run(*argv) -> int:
  return cli.main(["data", *map(str, argv)])


def records(source, split="train", **options):
  found = open_source(DataOptions(source=source, **options), split)
  return [found[i] for i in range(len(found))]


@pytest.mark.parametrize("kind", ("jsonl", "parquet"))
def test_a_converted_source_has_the_same_records(folder, kind, capsys):
  source = f"{kind}:{folder}/{{split}}.{kind}"
  assert run("convert", source, "--out", folder / "out", "--records-per-shard", 4) == 0
  assert capsys.readouterr().out.startswith("10 records of split train, 2 records of split held_out; 0 left out")
  converted = f"arrayrecord:{folder}/out/{{split}}-*.array_record"
  assert len(list((folder / "out").glob("train-*-of-00003.array_record"))) == 3
  for split in ("train", "held_out"):
    for choice in ("first", "random"):
      for found, expected in zip(
        records(converted, split, caption_choice=choice), records(source, split, caption_choice=choice), strict=True
      ):
        np.testing.assert_array_equal(found.pop("image"), expected.pop("image"))
        assert found == expected
  assert not list(folder.glob(".out*"))
  assert (folder / "train3.png").read_bytes() in (folder / "out/train-00000-of-00003.array_record").read_bytes()


def test_an_interrupted_conversion_goes_on(folder, monkeypatch):
  source = f"jsonl:{folder}/{{split}}.jsonl"
  options = dict(records_per_shard=2, num_threads=1)
  write, written = conversion._write_shard, []

  def failing(source, indices, path):
    if len(written) == 3:
      raise KeyboardInterrupt
    written.append(path.name)
    return write(source, indices, path)

  monkeypatch.setattr(conversion, "_write_shard", failing)
  with pytest.raises(KeyboardInterrupt):
    conversion.convert(DataOptions(source=source), folder / "out", **options)
  assert not (folder / "out").exists()
  monkeypatch.setattr(conversion, "_write_shard", lambda *a: written.append(a[2].name) or write(*a))
  conversion.convert(DataOptions(source=source), folder / "out", **options)
  assert len(written) == len(set(written)) == 6
  assert len(records(f"arrayrecord:{folder}/out/train-*.array_record")) == COUNT
  # Another source does not go on from what is there.
  with pytest.raises(ValueError, match="not an empty folder"):
    conversion.convert(DataOptions(source=source), folder / "out", **options)


def test_a_conversion_goes_on_after_a_full_disk(folder, capsys):
  argv = ("convert", f"jsonl:{folder}/train.jsonl", "--out", folder / "out")
  with full_disk(2000):
    assert run(*argv) == 1
  error = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
  assert len(error) == 1 and "train-00000-of-00001.array_record could not be written" in error[0]
  assert run(*argv) == 0


def test_a_damaged_held_out_split_is_not_left_out(folder):
  source = f"parquet:{folder}/{{split}}.parquet"
  (folder / "held_out.parquet").write_bytes(b"torn")
  with pytest.raises(ValueError, match="held_out.parquet is not a whole Parquet file"):
    conversion.convert(DataOptions(source=source), folder / "out", records_per_shard=4, num_threads=1)
  (folder / "held_out.parquet").unlink()
  done = conversion.convert(DataOptions(source=source), folder / "out", records_per_shard=4, num_threads=1)
  assert done.counts == {"train": COUNT}


def test_two_conversions_do_not_write_to_one_folder(folder):
  source = f"jsonl:{folder}/train.jsonl"
  (folder / ".out.converting").mkdir()
  with open(folder / ".out.converting" / conversion.LOCK_FILE, "a") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(ValueError, match="another process is converting to .*out"):
      conversion.convert(DataOptions(source=source), folder / "out", records_per_shard=4, num_threads=1)
  assert run("convert", source, "--out", folder / "out") == 0
  assert {file.suffix for file in (folder / "out").iterdir()} == {".array_record", ".json"}


def test_unreadable_records_are_left_out_up_to_the_limit(folder, capsys):
  source = f"jsonl:{folder}/train.jsonl"
  whole = (folder / "train4.png").read_bytes()
  (folder / "train4.png").write_bytes(whole[:40])
  assert run("convert", source, "--out", folder / "out") == 1
  error = capsys.readouterr().err
  assert "1 of 10 records of split train are unreadable" in error and "train.jsonl line 5" in error
  assert not (folder / "out").exists()
  assert run("convert", source, "--out", folder / "out", "--max-bad-fraction", 0.1) == 0
  captured = capsys.readouterr()
  assert "9 records of split train; 1 left out" in captured.out and "train4.png" not in captured.out
  assert "left out: " in captured.err and len(records(f"arrayrecord:{folder}/out/train-*")) == 9
  # Repaired after a refusal, everything is there.
  assert run("convert", source, "--out", folder / "again") == 1
  (folder / "train4.png").write_bytes(whole)
  assert run("convert", source, "--out", folder / "again") == 0
  assert len(records(f"arrayrecord:{folder}/again/train-*")) == 10


def test_inspect_says_what_there_is(folder, capsys):
  write_processor(folder / "processor")
  page = folder / "page.html"
  source = f"jsonl:{folder}/{{split}}.jsonl"
  tokens = ("--processor", folder / "processor", "--caption-tokens", 2)
  assert run("inspect", source, *tokens, "--page", page) == 0
  out = " ".join(capsys.readouterr().out.split())
  for expected in (
    "records 10",
    "unreadable 0",
    "height in pixels 24 to 24",
    "width in pixels 16 to 88",
    "shape: wide",
  ):
    assert expected in out
  assert "without caption 0" in out and "longer than 2 tokens 100.0 %" in out
  html = page.read_text()
  assert html.count("<article") == 10 and "red circle 3" in html
  assert run("inspect", source, "--buckets", "24x24,24x48", "--max-crop", 0.3) == 0
  out = " ".join(capsys.readouterr().out.split())
  assert "bucket 24x24 20.0 %, of which 12.5 % is cropped on average, 25.0 % at most" in out
  assert "bucket 24x48 40.0 %, of which 14.0 % is cropped on average, 25.0 % at most in no bucket 40.0 %" in out
  (folder / "train4.png").write_bytes(b"")
  assert run("inspect", source) == 1
  assert "train.jsonl line 5 (cannot read image" in capsys.readouterr().out


def test_inspect_names_images_of_equal_pixels_and_counts_equal_captions(tmp_path, capsys):
  Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
  Image.new("RGB", (8, 8), "red").save(tmp_path / "b.bmp")
  Image.new("RGB", (4, 16), "red").save(tmp_path / "c.png")
  lines = [{"image": name, "caption": "red"} for name in ("a.png", "c.png", "b.bmp", "a.png")]
  (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  assert run("inspect", f"jsonl:{tmp_path}/x.jsonl") == 0
  out = " ".join(capsys.readouterr().out.split())
  assert "images with the pixels of an earlier one 2" in out and "captions equal to an earlier one 3" in out
  assert out.count("x.jsonl line 1") == 2 and "x.jsonl line 3 has the pixels of" in out


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (("convert", "jsonl:a"), "--out goes with convert"),
    (("inspect", "jsonl:a", "--out", "x"), "--out goes with convert"),
    (("inspect", "jsonl:nowhere.jsonl"), "nowhere.jsonl does not exist"),
    (("convert", "scenes", "--out", "{folder}/o"), "stores no records"),
    (("convert", "prompts:{folder}/train.jsonl", "--out", "{folder}/o"), "has no images"),
  ],
)
def test_what_cannot_be_done_is_one_line(folder, capsys, argv, message):
  with pytest.raises(SystemExit) if "--out goes" in message else io.StringIO():
    assert run(*(text.replace("{folder}", str(folder)) for text in argv)) == 1
  assert message in capsys.readouterr().err
