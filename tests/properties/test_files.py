"""Files are written atomically, lines end only at newlines, and image suffixes are defined in one place."""

import base64
import contextlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
import threading

import numpy as np
from PIL import Image
import pytest

from uae_jax import files
from uae_jax.commands.items import JsonLines, OutputError
from uae_jax.data.image_files import expand
from uae_jax.data.prompt_lines import Line, read_lines
from uae_jax.data.sources import open_source
from uae_jax.evaluation import unified_bench
from uae_jax.options import DataOptions

pytestmark = pytest.mark.fast


def test_a_file_is_replaced_whole(tmp_path):
  file = tmp_path / "a.json"
  files.write_whole(file, "é\n")
  assert file.read_bytes() == "é\n".encode()
  files.write_whole(file, b"\x00\r\n")
  assert file.read_bytes() == b"\x00\r\n" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, step):
  file = tmp_path / "a.json"
  file.write_text("old")

  def fail(*_):
    raise OSError("no space left")

  monkeypatch.setattr(files.os, step, fail)
  with pytest.raises(OSError, match="no space"):
    files.write_whole(file, "new")
  assert file.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


@contextlib.contextmanager
def full_disk(num_bytes: int):
  """Context in which no file can be longer."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_line_is_whole_or_absent_on_a_full_disk(tmp_path):
  file, lines = tmp_path / "a.jsonl", JsonLines(tmp_path / "b.jsonl")
  with full_disk(30):
    files.append_line(file, "x" * 20)
    with pytest.raises(OSError) as error:
      files.append_line(file, "y" * 20)
    lines.write({"caption": "x"})
    with pytest.raises(OutputError, match="b.jsonl"):
      lines.write({"caption": "y" * 20})
    lines.close()
  assert error.value.filename == str(file) and file.read_text() == "x" * 20 + "\n"
  assert lines.path.read_text() == '{"caption": "x"}\n'


def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path):
  target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
  link.symlink_to(target)
  files.write_whole(link, "text")
  assert link.is_symlink() and target.read_text() == "text"
  os.mkfifo(pipe)
  found = []
  reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
  reader.start()
  files.write_whole(pipe, "text")
  reader.join()
  assert found == ["text"] and pipe.is_fifo()


def test_a_long_name_is_written(tmp_path):
  files.write_whole(tmp_path / ("x" * 255), "text")


@pytest.mark.parametrize(
  ("content", "lines"),
  [
    (b"", []),
    (b"\n", [""]),
    (b"a\nb", ["a", "b"]),
    (b"a\r\nb\r\n", ["a", "b"]),
    (b"\xef\xbb\xbfa\r\n", ["a"]),
    ("a\u2028b\x85c\x0bd\x0ce\x1cf\rg\n".encode(), ["a\u2028b\x85c\x0bd\x0ce\x1cf\rg"]),
  ],
)
def test_only_line_feeds_end_a_line(tmp_path, content, lines):
  (tmp_path / "a").write_bytes(content)
  assert files.read_lines(tmp_path / "a") == lines


@pytest.mark.parametrize(
  ("path", "shown"),
  [
    ("gs://bucket/run", "gs://bucket/run"),
    ("gs:/bucket/run", "gs:/bucket/run"),
    ("https://me:secret@host/a?key=secret", "https://host/a"),
    ("file:///tmp/x", "file:///tmp/x"),
  ],
)
def test_addresses_are_no_paths(path, shown):
  with pytest.raises(ValueError) as error:
    files.local_path(path)
  assert str(error.value).startswith(f"{shown}: an address") and "secret" not in str(error.value)


def test_a_tilde_is_the_home_folder(monkeypatch):
  monkeypatch.setenv("HOME", "/home/me")
  paths = {"~/a": "/home/me/a", "~": "/home/me", "a/~": "a/~", "": "", "C:/a": "C:/a", "runs/a:stage": "runs/a:stage"}
  assert {path: files.local_path(path) for path in paths} == paths


def test_a_folder_is_whole_or_absent(tmp_path):
  target = tmp_path / "new" / "export"
  with pytest.raises(RuntimeError), files.whole_folder(target) as folder:
    (folder / "a").write_text("half")
    raise RuntimeError
  assert os.listdir(target.parent) == []
  with files.whole_folder(target) as folder:
    assert not target.exists()
    (folder / "a").write_text("whole")
  assert os.listdir(target.parent) == ["export"] and os.listdir(target) == ["a"]


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path):
  target = tmp_path / "export"
  code = "import os, sys\nfrom uae_jax import files\nwith files.whole_folder(sys.argv[1]): os.kill(os.getpid(), 9)"
  subprocess.run([sys.executable, "-c", code, target], check=False)
  assert len(os.listdir(tmp_path)) == 1
  with files.whole_folder(tmp_path / "other"), files.whole_folder(target) as first:
    with pytest.raises(OSError), files.whole_folder(target) as second:
      (second / "b").write_text("second")
      assert first.exists()
      (tmp_path / "export").mkdir()
      (tmp_path / "export" / "a").write_text("in the way")
    shutil.rmtree(target)
  assert sorted(os.listdir(tmp_path)) == ["export", "other"]


def test_what_is_not_utf8_is_named(tmp_path):
  (tmp_path / "a.txt").write_bytes("é".encode("latin-1"))
  with pytest.raises(ValueError, match="a.txt: not UTF-8"):
    files.read_lines(tmp_path / "a.txt")


def test_prompts_of_other_systems(tmp_path):
  text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
  text.write_bytes(b"\xef\xbb\xbfa red fox\r\n\r\nblue\r\n")
  assert [line.prompt() for line in read_lines(text)] == ["a red fox", "blue"]
  lines.write_text(json.dumps({"prompt": "one\u2028\x85two"}, ensure_ascii=False) + "\r\n", encoding="utf-8-sig")
  assert [line.prompt() for line in read_lines(lines)] == ["one\u2028\x85two"]
  lines.write_text('{"prompt": "a"}\n{"prompt": null}\n')
  good, bad = read_lines(lines)
  assert good.prompt() == "a" and str(bad).endswith("p.jsonl:2")
  with pytest.raises(ValueError, match="the prompt has 120000 characters, expected 32000 or fewer"):
    Line("prompt 1", "blue  " * 20_000).prompt()
  with pytest.raises(ValueError, match="expected a JSON object"):
    bad.prompt()


def test_images_as_text():
  pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
  decoded = Image.open(io.BytesIO(base64.b64decode(files.png_base64(pixels))))
  np.testing.assert_array_equal(np.asarray(decoded), pixels)
  assert files.data_uri(pixels).startswith("data:image/png;base64,iVBOR")
  assert files.data_uri(Image.fromarray(pixels), "JPEG", quality=90).startswith("data:image/jpeg;base64,/9j/")


@pytest.mark.parametrize("suffix", sorted(files.IMAGE_SUFFIXES))
def test_every_command_and_source_finds_the_same_images(tmp_path, suffix):
  file = tmp_path / f"a{suffix.upper()}"
  Image.new("RGB", (8, 8), "red").save(file, "TIFF" if "tif" in suffix else None)
  assert expand([str(tmp_path)]) == [file]
  data = DataOptions(source=f"folder:{tmp_path}")
  record = open_source(data, "train")[0]
  assert record["image"].shape == (8, 8, 3)
  assert unified_bench.image_files(tmp_path, suffixes=files.IMAGE_SUFFIXES) == [file]
