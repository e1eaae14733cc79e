"""Commands: fast help, one-line errors; caption, generate and reconstruct on ordinary files with a fake model."""

import errno
import os
from pathlib import Path
import platform
import re
import resource
import signal
import subprocess
import sys

import jax
from PIL import Image
import pytest

from tests.end_to_end.stand_in_model import EVIL, StandIn, lines, run
from uae_jax import cli
from uae_jax.commands import model_arguments

pytestmark = pytest.mark.fast

UAE_JAX = Path(sys.executable).with_name("uae-jax")


def errors(capsys) -> list[str]:
  return [line for line in capsys.readouterr().err.splitlines() if "error:" in line]


@pytest.mark.parametrize("command", [[], *([command] for command in cli.COMMANDS)], ids=" ".join)
def test_help_takes_less_than_a_second_of_processor_time(command):
  before = processor_seconds_of_children()
  result = subprocess.run([UAE_JAX, *command, "--help"], capture_output=True, text=True)
  assert result.returncode == 0 and result.stderr == ""
  assert f"usage: uae-jax{' ' if command else ''}{' '.join(command)}" in result.stdout
  assert processor_seconds_of_children() - before < 1.0


def processor_seconds_of_children() -> float:
  usage = resource.getrusage(resource.RUSAGE_CHILDREN)
  return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
  ("argv", "code", "expected"),
  [
    (["captoin"], 2, "uae-jax: error: no command 'captoin', did you mean 'caption'? (see uae-jax --help)"),
    (["caption", "--images", "x"], 2, "uae-jax caption: error: the following arguments are required: --model"),
    (["generate", "--model", "m", "--out", "o"], 2, "one of the arguments --prompt --prompts is required"),
    (["caption", "--model", "m", "--images", "x", "--batch-size", "0"], 2, "'0': expected a whole number, 1 or more"),
    (["caption", "--model", "m", "--images", "x", "--bacth-size", "1"], 2, "unrecognized arguments: --bacth-size 1"),
    (
      ["generate", "--model", "nowhere", "--prompt", "x", "--out", "o"],
      1,
      "uae-jax generate: error: nowhere: no such model",
    ),
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
    (4, 0, {"temperature": 0.0, "indices": [0, 1, 2, 3], "batch_size": 4}),
    (4, 0, {"temperature": 0.0, "indices": [4, 5, 6, 7], "batch_size": 4}),
    (1, 0, {"temperature": 0.0, "indices": [8], "batch_size": 4}),
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
  reported = errors(capsys)
  assert len(reported) == 5
  for name in ("torn.png", "text.jpg", "absent.png", "none*.png", "empty"):
    assert sum(name in line for line in reported) == 1
  assert len(lines(Path("out/captions.jsonl"))) == 9
  assert "Failed: " in Path("out/index.html").read_text()


def test_reconstruct_writes_images_and_an_escaped_page(model, photographs, capsys):
  (photographs / "again").mkdir()
  Image.new("RGB", (9, 9)).save(photographs / "again" / "mode_RGB.jpg")
  images = (photographs / "mode_RGB.png", photographs / "again")
  assert run("reconstruct", "--model", model, "--images", *images, "--out", "out", "--steps", 4) == 0
  found = lines(Path("out/captions.jsonl"))
  assert [line["reconstruction"] for line in found] == ["recon_mode_RGB.png.png", "recon_mode_RGB.jpg.png"]
  assert all(Image.open(Path("out") / line["reconstruction"]).size == (32, 32) for line in found)
  html = Path("out/index.html").read_text()
  assert "<script>" not in html and "&lt;script&gt;" in html
  assert "knows only synthetic scenes" in html
  assert ("reconstruct", 2, 0, {"steps": 4, "indices": [0, 1]}) in StandIn.calls


def test_names_of_any_bytes(model, photographs, capsys):
  """A name that is not UTF-8 is kept; one that is too long for its result fails alone."""
  odd, long = os.fsdecode(b"caf\xe9.png"), "x" * 248 + ".png"
  for name in (odd, long):
    Image.new("RGB", (9, 9)).save(Path("photographs") / name)
  assert run("caption", "--model", model, "--images", photographs) == 0
  assert odd in [Path(line["image"]).name for line in lines(Path("captions.jsonl"))]
  capsys.readouterr()
  assert run("reconstruct", "--model", model, "--images", photographs, "--out", "out") == 1
  reported = errors(capsys)
  assert len(reported) == 1 and "File name too long" in reported[0] and "xxx" in reported[0]
  found = lines(Path("out/captions.jsonl"))
  assert len(found) == 10 and f"recon_{odd}" in [line["reconstruction"] for line in found]
  assert (Path("out") / f"recon_{odd}").exists()
  page = Path("out/index.html").read_text(encoding="utf-8")
  assert "recon_caf%E9.png" in page and "caf\\udce9.png" in page


def test_an_image_that_the_model_refuses_fails_alone(model, photographs, capsys, monkeypatch):
  def caption(self, images, seed=0, **options):
    if any(image.width > 200 * image.height for image in images):
      raise ValueError("an image of 900 x 2 pixels is narrower than 1 to 200")
    return ["a caption" for _ in images]

  monkeypatch.setattr(StandIn, "caption", caption)
  Image.new("RGB", (900, 2)).save(photographs / "mode_narrow.png")
  assert run("caption", "--model", model, "--images", photographs, "--batch-size", 3) == 1
  reported = errors(capsys)
  assert len(reported) == 1 and "mode_narrow.png: an image of 900 x 2 pixels" in reported[0]
  assert len(lines(Path("captions.jsonl"))) == 9


def test_results_are_kept_if_the_command_ends_early(model, photographs, monkeypatch):
  def caption(self, images, seed=0, **options):
    if options["indices"][0] == 4:
      raise KeyboardInterrupt
    return ["a caption" for _ in images]

  monkeypatch.setattr(StandIn, "caption", caption)
  assert run("caption", "--model", model, "--images", photographs, "--batch-size", 4) == 130
  assert len(lines(Path("captions.jsonl"))) == 4


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
  calls = [call for call in StandIn.calls if call[0] == "generate"]
  assert [(call[2], call[3]["indices"]) for call in calls] == [(3, [0, 1]), (3, [2])]


def test_a_prompt_that_fails_does_so_alone(model, capsys):
  Path("out").mkdir()
  Path("out/images.jsonl").write_text("earlier")
  assert run("generate", "--model", model, "--prompt", "fail", "--out", "out") == 1
  assert "prompt 1: RuntimeError: out of memory" in errors(capsys)[0]
  assert Path("out/images.jsonl").read_text() == "earlier"
  prompts = ["red", "fail", "blue", os.fsdecode(b"\xff")]
  assert run("generate", "--model", model, *(f"--prompt={prompt}" for prompt in prompts), "--out", "out") == 1
  reported = errors(capsys)
  assert len(reported) == 2
  assert "prompt 2: RuntimeError" in reported[1] and "prompt 4: the prompt has characters" in reported[0]
  assert [line["image"] for line in lines(Path("out/images.jsonl"))] == ["00000.png", "00002.png"]
  assert run("generate", "--model", model, "--prompt", "red", "--height", 30, "--out", "new") == 1
  assert "multiples of 16" in errors(capsys)[0] and not Path("new").exists()


@pytest.mark.parametrize(
  ("flag", "text", "expected"),
  [
    ("--guidance", "nan", "a number, 0 or more"),
    ("--guidance", "-1", "a number, 0 or more"),
    ("--guidance", "inf", "a number, 0 or more"),
    ("--steps", "-3", "a whole number, 1 or more"),
    ("--steps", "2.5", "a whole number, 1 or more"),
    ("--height", "0", "a whole number, 1 or more"),
    ("--width", "-16", "a whole number, 1 or more"),
    ("--temperature", "nan", "a number, 0 or more"),
    ("--temperature", "-0.1", "a number, 0 or more"),
    ("--max-new-tokens", "0", "a whole number, 1 or more"),
    ("--seed", "-1", "a whole number, 0 or more, 4294967295 or less"),
    ("--seed", "4294967296", "a whole number, 0 or more, 4294967295 or less"),
    ("--batch-size", "many", "a whole number, 1 or more"),
  ],
)
def test_numbers_out_of_range_are_refused(capsys, flag, text, expected):
  assert run("reconstruct", "--model", "absent", "--images", "x", "--out", "o", f"{flag}={text}") == 2
  assert errors(capsys) == [
    f"uae-jax reconstruct: error: argument {flag}: {text!r}: expected {expected} (see uae-jax reconstruct --help)"
  ]


PATHS = {
  "train": ("--config=c.py --workdir=PATH", "--config=PATH --workdir=d"),
  "caption": ("--model=PATH --images x", "--model=m --images=PATH", "--model=m --images x --out=PATH"),
  "generate": (
    "--model=PATH --prompt x --out=o",
    "--model=m --prompts=PATH --out=o",
    "--model=m --prompt x --out=PATH",
  ),
  "reconstruct": (
    "--model=PATH --images x --out o",
    "--model=m --images=PATH --out=o",
    "--model=m --images x --out=PATH",
  ),
  "data": (
    "inspect x --data-dir=PATH",
    "inspect x --processor=PATH",
    "inspect x --page=PATH",
    "inspect folder:PATH",
    "convert folder:x --out=PATH",
  ),
  "convert": ("--to=peft --source=PATH --target=t", "--to=peft --source=s --target=PATH"),
  "bench": (
    "--references=PATH --images=i --embedders=clip=c",
    "--references=r --images=PATH --embedders=clip=c",
    "--references=r --images=i --embedders=clip=PATH",
    "--references=r --images=i --embedders=clip=c --out=PATH",
    "--references=r --captions=PATH --against=a --judge-url=http://h/v1 --judge-model=m",
    "--references=r --captions=c --against=PATH --judge-url=http://h/v1 --judge-model=m",
    "--references=r --captions=c --against=a --judge-url=http://h/v1 --judge-model=m --cache=PATH",
  ),
  "plan": ("--config=PATH --topology=v5e:4x4", "--config=c.py --topology=v5e:4x4 --json=PATH"),
  "report": ("--workdir=PATH",),
  "evaluate": (
    "--suite=geneval --prompts=PATH --out=o",
    "--suite=geneval --prompts=p --out=PATH",
    "--suite=geneval --prompts=p --out=o --model=PATH",
    "--suite=geneval --prompts=p --out=o --results PATH",
    "--out=o --like=PATH",
    "--suite=vqa:PATH --out=o",
    "--suite=unified_bench --prompts=p --out=o --against=PATH",
  ),
  "serve": ("--model=PATH",),
  "compare": ("PATH b", "a PATH", "a b --page=PATH"),
  "status": ("PATH", "a PATH"),
  "sweep": ("--config=c.py --workdir=PATH", "--config=PATH --workdir=d"),
}


def test_every_command_has_its_paths_tested():
  assert set(PATHS) == set(cli.COMMANDS)


@pytest.mark.parametrize(("command", "line"), [(name, line) for name, lines in PATHS.items() for line in lines])
def test_addresses_are_refused_before_any_work(model, capsys, command, line):
  # What is only read, and results, may be in a bucket.
  scheme = "gs" if re.search("--(workdir|cache)=PATH", line) else "s3"
  assert run(command, *line.replace("PATH", f"{scheme}://bucket/x").split()) in (1, 2)
  reported = errors(capsys)
  assert len(reported) == 1 and f"{scheme}://bucket/x: an address, expected a path of this machine" in reported[0]
  assert os.listdir(".") == ["model"]


def test_a_tilde_after_an_equals_sign_is_the_home_folder(model, photographs, monkeypatch):
  monkeypatch.setenv("HOME", str(photographs.parent / "home"))
  assert run("caption", f"--model={model}", "--images", photographs, "--out=~/deep/captions.jsonl") == 0
  assert Path("home/deep/captions.jsonl").exists() and not Path("~").exists()


def test_programs_are_kept_between_commands_unless_jax_is_told_where(tmp_path, monkeypatch):
  names = ("dir", "max_size")
  before = {name: jax.config.values[f"jax_compilation_cache_{name}"] for name in names}
  shortest = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
  monkeypatch.setenv("UAE_JAX_CACHE", str(tmp_path / "cache"))
  try:
    model_arguments.keep_programs()
    assert jax.config.values["jax_compilation_cache_dir"] == before["dir"] and not (tmp_path / "cache").exists()
    jax.config.update("jax_compilation_cache_dir", None)
    (tmp_path / "file").touch()
    monkeypatch.setenv("UAE_JAX_CACHE", str(tmp_path / "file"))
    model_arguments.keep_programs()
    assert jax.config.values["jax_compilation_cache_dir"] is None
    monkeypatch.setenv("UAE_JAX_CACHE", str(tmp_path / "cache"))
    torn = tmp_path / "cache" / "programs" / platform.node() / "torn-cache"
    torn.parent.mkdir(parents=True)
    torn.touch()
    model_arguments.keep_programs()
    assert not torn.exists()
    folder = Path(jax.config.values["jax_compilation_cache_dir"])
    assert folder.is_dir() and folder.is_relative_to(tmp_path / "cache")
  finally:
    for name, value in before.items():
      jax.config.update(f"jax_compilation_cache_{name}", value)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", shortest)


@pytest.mark.parametrize("ending", ["full disk", "SIGTERM"])
def test_a_conversion_that_ends_early_leaves_nothing(tmp_path, monkeypatch, capsys, ending):
  from uae_jax.training import restore
  from uae_jax.weights import native

  def save(folder, loaded):
    (folder / "half").write_text("half")
    if ending == "SIGTERM":
      os.kill(os.getpid(), signal.SIGTERM)
    raise OSError(errno.ENOSPC, "No space left on device", "params")

  monkeypatch.setattr(restore, "read", lambda *_: None)
  monkeypatch.setattr(native, "save", save)
  before = signal.getsignal(signal.SIGTERM)
  code = run("convert", "--source", tmp_path, "--target", tmp_path / "new" / "export", "--to", "orbax")
  reported = errors(capsys)
  if ending == "SIGTERM":
    assert code == cli.TERMINATED and reported == []
  else:
    assert code == 1 and len(reported) == 1
    assert "export could not be written, and nothing of it is left: OSError: [Errno 28] No space left" in reported[0]
  assert os.listdir(tmp_path / "new") == [] and signal.getsignal(signal.SIGTERM) == before


def test_a_reader_that_ends_is_no_error():
  """`uae-jax ... | head` ends without a message."""
  code = (
    "import sys, types\nfrom uae_jax import cli\n"
    "def main(argv):\n  while True: print('x' * 1000)\n"
    "sys.modules['uae_jax.commands.caption'] = types.SimpleNamespace(main=main)\nsys.exit(cli.main(['caption']))"
  )
  process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  process.stdout.readline()
  process.stdout.close()
  assert process.stderr.read() == b"" and process.wait() == 1


def test_generate_reads_captions_of_json_lines(model, capsys):
  Path("prompts.jsonl").write_text('{"caption": "red circle"}\n{"prompt": "blue square"}\n')
  assert run("generate", "--model", model, "--prompts", "prompts.jsonl", "--out", "out") == 0
  assert StandIn.calls[-1][1] == ["red circle", "blue square"]
  Path("prompts.jsonl").write_text('{"caption": "red circle"}\n{"text": "blue square"}\n')
  assert run("generate", "--model", model, "--prompts", "prompts.jsonl", "--out", "out") == 1
  assert "prompts.jsonl:2: expected a JSON object" in errors(capsys)[0]
  assert [line["prompt"] for line in lines(Path("out/images.jsonl"))] == ["red circle"]
  Path("prompts.CSV").write_text("prompt,seed\nred circle,1\n")
  assert run("generate", "--model", model, "--prompts", "prompts.CSV", "--out", "out") == 1
  assert "prompts.CSV: a table" in errors(capsys)[0]
