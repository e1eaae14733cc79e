"""Commands: fast help, one-line errors; caption, generate and reconstruct on ordinary files with a fake model."""

import json
from pathlib import Path
import subprocess
import sys
import time
import types

import numpy as np
from PIL import Image
import pytest

from uae_jax import cli

pytestmark = pytest.mark.fast

UAE_JAX = Path(sys.executable).with_name("uae-jax")
EVIL = "<script>alert(1)</script>"


class StandIn:
  """A fake `uae_jax.UAE`: captions state the image size, generated images are gray."""

  is_small_world = True
  calls: list = []

  @classmethod
  def load(cls, path, **options):
    if not Path(path).is_dir():
      raise FileNotFoundError(f"{path}: no such model")
    cls.calls = [("load", options)]
    return cls()

  def caption(self, images, seed=0, **options):
    self.calls.append(("caption", len(images), seed, options))
    assert all(image.mode == "RGB" for image in images)
    return [f"{EVIL} {image.width}x{image.height}" for image in images]

  def generate(self, prompts, seed=0, **options):
    self.calls.append(("generate", list(prompts), seed, options))
    return [Image.new("RGB", (32, 32), "grey") for _ in prompts]

  def reconstruct(self, images, seed=0, **options):
    self.calls.append(("reconstruct", len(images), seed, options))
    return self.caption(images), [Image.new("RGB", (32, 32), "grey") for _ in images]


@pytest.fixture
def model(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "uae_jax.api", types.SimpleNamespace(UAE=StandIn))
  monkeypatch.chdir(tmp_path)
  (tmp_path / "model").mkdir()
  return "model"


@pytest.fixture
def photographs(tmp_path):
  """Ordinary image files of every mode and of odd sizes."""
  folder = tmp_path / "photographs"
  folder.mkdir()
  for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "F"):
    suffix = {"CMYK": "jpg", "F": "tiff"}.get(mode, "png")
    name = f"mode_{mode.replace(';', '')}.{suffix}"
    if mode == "I;16":
      Image.fromarray(np.full((5, 7), 40000, np.uint16)).save(folder / name)
    else:
      Image.new(mode, (7, 5)).save(folder / name)
  return folder


def run(*argv) -> int:
  """Runs a command like a process would, including the exits of argparse."""
  try:
    return cli.main([str(argument) for argument in argv])
  except SystemExit as error:
    return error.code


def errors(capsys) -> list[str]:
  return [line for line in capsys.readouterr().err.splitlines() if "error:" in line]


def lines(file: Path) -> list[dict]:
  return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("command", [[], *([command] for command in cli.COMMANDS)], ids=" ".join)
def test_help_answers_within_a_second(command):
  seconds = []
  for _ in range(3):
    start = time.perf_counter()
    result = subprocess.run([UAE_JAX, *command, "--help"], capture_output=True, text=True)
    seconds.append(time.perf_counter() - start)
    assert result.returncode == 0 and result.stderr == ""
    assert f"usage: uae-jax{' ' if command else ''}{' '.join(command)}" in result.stdout
    if seconds[-1] < 1.0:
      break
  assert min(seconds) < 1.0


@pytest.mark.parametrize(
  ("argv", "code", "expected"),
  [
    (["captoin"], 2, "uae-jax: error: no command 'captoin', did you mean 'caption'? (see uae-jax --help)"),
    (["caption", "--images", "x"], 2, "uae-jax caption: error: the following arguments are required: --model"),
    (["generate", "--model", "m", "--out", "o"], 2, "one of the arguments --prompt --prompts is required"),
    (["caption", "--model", "m", "--images", "x", "--batch-size", "0"], 2, "0 is not a positive number"),
    (["caption", "--model", "m", "--images", "x", "--bacth-size", "1"], 2, "unrecognized arguments: --bacth-size 1"),
    (["caption", "--model", "nowhere", "--images", "x"], 1, "uae-jax caption: error: nowhere: no such model"),
    (["generate", "--model", "model", "--prompts", "absent.txt", "--out", "o"], 1, "absent.txt: No such file"),
    (["report", "--workdir", "nowhere"], 1, "uae-jax report: error: nowhere: no such workdir"),
    (["report", "--workdir", "."], 1, "not the workdir of a run"),
  ],
)
def test_an_error_is_one_line_on_stderr(model, capsys, argv, code, expected):
  assert run(*argv) == code
  captured = capsys.readouterr()
  assert captured.out == ""
  assert expected in captured.err and captured.err.count("\n") == 1


def test_verbose_shows_the_traceback(model, capsys):
  assert run("report", "--workdir", "nowhere", "--verbose") == 1
  assert "Traceback" in capsys.readouterr().err


def test_no_command_shows_the_usage(capsys):
  assert run() == 2
  assert "usage: uae-jax" in capsys.readouterr().err


def test_caption_writes_a_line_an_image(model, photographs, capsys):
  assert run("caption", "--model", model, "--images", photographs, "--batch-size", 4, "--temperature", 0) == 0
  found = lines(Path("captions.jsonl"))
  assert [Path(line["image"]).name for line in found] == sorted(file.name for file in photographs.iterdir())
  assert all(line["caption"] == f"{EVIL} 7x5" for line in found)
  assert [call[1:] for call in StandIn.calls if call[0] == "caption"] == [
    (4, 0, {"temperature": 0.0}),
    (4, 4, {"temperature": 0.0}),
    (1, 8, {"temperature": 0.0}),
  ]
  assert "knows only synthetic scenes" in capsys.readouterr().err


def test_files_folders_and_globs_are_taken_once(model, photographs):
  first = photographs / "mode_RGB.png"
  assert run("caption", "--model", model, "--images", first, f"{photographs}/*.jpg", photographs, "--out", "-") == 0
  assert sum(call[1] for call in StandIn.calls if call[0] == "caption") == len(list(photographs.iterdir()))


def test_unreadable_images_are_named_and_the_others_done(model, photographs, capsys):
  (photographs / "torn.png").write_bytes((photographs / "mode_RGB.png").read_bytes()[:40])
  (photographs / "text.jpg").write_text("no image")
  Path("empty").mkdir()
  images = (photographs, "absent.png", "none*.png", "empty")
  assert run("reconstruct", "--model", model, "--images", *images, "--out", "out") == 1
  told = errors(capsys)
  assert len(told) == 5
  for name in ("torn.png", "text.jpg", "absent.png", "none*.png", "empty"):
    assert sum(name in line for line in told) == 1
  assert len(lines(Path("out/captions.jsonl"))) == 9
  assert "Not readable" in Path("out/index.html").read_text()


def test_reconstruct_writes_images_and_an_escaped_page(model, photographs, capsys):
  (photographs / "again").mkdir()
  Image.new("RGB", (9, 9)).save(photographs / "again" / "mode_RGB.jpg")
  images = (photographs / "mode_RGB.png", photographs / "again")
  assert run("reconstruct", "--model", model, "--images", *images, "--out", "out", "--steps", 4) == 0
  found = lines(Path("out/captions.jsonl"))
  assert [line["reconstruction"] for line in found] == ["recon_mode_RGB.png", "recon_mode_RGB_2.png"]
  assert all(Image.open(Path("out") / line["reconstruction"]).size == (32, 32) for line in found)
  html = Path("out/index.html").read_text()
  assert "<script>" not in html and "&lt;script&gt;" in html
  assert "knows only synthetic scenes" in html
  assert ("reconstruct", 2, 0, {"steps": 4}) in StandIn.calls


def test_nothing_readable_leaves_earlier_results_alone(model, capsys):
  Path("captions.jsonl").write_text("earlier")
  assert run("caption", "--model", model, "--images", "absent.png") == 1
  assert Path("captions.jsonl").read_text() == "earlier"
  assert run("reconstruct", "--model", model, "--images", "absent.png", "--out", "out") == 1
  assert not Path("out").exists()


def test_generate_paints_every_prompt(model):
  Path("prompts.txt").write_text("red circle\n\nblue square\ngreen cross\n")
  assert (
    run("generate", "--model", model, "--prompts", "prompts.txt", "--out", "out", "--batch-size", 2, "--seed", 3) == 0
  )
  assert [line["prompt"] for line in lines(Path("out/images.jsonl"))] == ["red circle", "blue square", "green cross"]
  assert sorted(file.name for file in Path("out").glob("*.png")) == ["00000.png", "00001.png", "00002.png"]
  assert [call[2] for call in StandIn.calls if call[0] == "generate"] == [3, 5]


def test_generate_reads_captions_of_json_lines(model, capsys):
  Path("prompts.jsonl").write_text('{"caption": "red circle"}\n{"prompt": "blue square"}\n')
  assert run("generate", "--model", model, "--prompts", "prompts.jsonl", "--out", "out") == 0
  assert StandIn.calls[-1][1] == ["red circle", "blue square"]
  Path("prompts.jsonl").write_text('{"caption": "red circle"}\n{"text": "blue square"}\n')
  assert run("generate", "--model", model, "--prompts", "prompts.jsonl", "--out", "out") == 1
  assert "prompts.jsonl:2: expected a JSON object" in errors(capsys)[0]
