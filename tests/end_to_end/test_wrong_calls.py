"""A wrong call of a command: one line that says what is wrong, before a model is loaded, and no file is changed."""

import os
from pathlib import Path
import shlex

from PIL import Image
import pytest

from uae_jax import cli
from uae_jax.commands import model_arguments

pytestmark = pytest.mark.fast

CONFIG = Path(__file__).parents[2] / "configs" / "scenes.py"
GENEVAL = '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}\n'


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A working directory with files of many kinds; a model that is loaded is an error."""

  def load(arguments):
    raise AssertionError("the model is loaded")

  monkeypatch.setattr(model_arguments, "load", load)
  monkeypatch.chdir(tmp_path)
  for name in ("pics", "empty", "run", "others", "results"):
    (tmp_path / name).mkdir()
  Image.new("RGB", (16, 16)).save("pics/a.png")
  Image.new("RGB", (16, 16)).save("others/00000.png")
  Image.new("RGB", (16, 16)).save("others/recon_a.png")
  Path("others/items.jsonl").write_text('{"key": "a"}\n')
  Path("run/config.json").write_text("{}")
  Path("prompts.txt").write_text("red circle\n")
  Path("captions.jsonl").write_text('{"image": "a.png", "caption": "red"}\n')
  Path("geneval.jsonl").write_text(GENEVAL)
  return tmp_path


def contents(folder: Path) -> dict:
  return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


IMAGES = "caption --model m --images pics/a.png"
GENERATE = "generate --model m --prompt x"
RECONSTRUCT = "reconstruct --model m --images pics/a.png"
PLAN = f"plan --config={CONFIG} --topology=v5e:2x2"
BENCH = "bench --references pics --images pics --embedders clip=c"
JUDGE = "bench --references pics --captions captions.jsonl --against captions.jsonl --judge-url http://h/v1"
EVALUATE = "evaluate --suite geneval --prompts geneval.jsonl --out o --model m"
SWEEP = f"sweep --config={CONFIG} --grid=config.seed=0,1"
TRAIN = f"train --config={CONFIG}:smoke"
CALLS = [
  # Outputs that cannot be written.
  (f"{IMAGES} --out pics", "--out pics is a folder, expected a file"),
  (f"{IMAGES} --out prompts.txt/x.jsonl", "prompts.txt is not a folder"),
  (f"{IMAGES} --out /proc/x/y.jsonl", "nothing can be written in /proc"),
  (f"{GENERATE} --out prompts.txt", "prompts.txt is not a folder"),
  (f"{RECONSTRUCT} --out prompts.txt/x", "prompts.txt is not a folder"),
  ("convert --source run --target prompts.txt/x --to peft", "prompts.txt is not a folder"),
  ("convert --source run --target new/../pics --to peft", "pics exists and is not an empty folder"),
  ("data inspect folder:pics --page pics", "--page pics is a folder"),
  ("data convert folder:pics --out prompts.txt/x", "prompts.txt is not a folder"),
  (f"{PLAN} --json=pics", "--json pics is a folder"),
  (f"{BENCH} --out prompts.txt/r.json", "prompts.txt is not a folder"),
  (f"{EVALUATE} --out prompts.txt/x", "--out is given 2 times"),
  (f"{EVALUATE.replace('--out o', '--out prompts.txt')}", "prompts.txt is not a folder"),
  ("compare a b --page prompts.txt/x.html", "prompts.txt is not a folder"),
  (f"{SWEEP} --workdir=prompts.txt", "prompts.txt is not a folder"),
  (f"{SWEEP} --workdir=run", "--workdir=run is a run"),
  (f"{TRAIN} --workdir=prompts.txt/x", "prompts.txt is not a folder"),
  # Outputs that would replace another's file.
  (f"{IMAGES} --out pics/a.png", "--out pics/a.png is read by this command"),
  (f"{IMAGES} --out prompts.txt", "--out prompts.txt is not an earlier result"),
  (f"{GENERATE} --out others", "others has 00000.png but no images.jsonl"),
  (f"{RECONSTRUCT} --out others", "others has recon_a.png but no captions.jsonl"),
  ("data inspect folder:pics --page pics/a.png", "--page pics/a.png is not an earlier result"),
  (f"{PLAN} --json=prompts.txt", "--json prompts.txt is not an earlier result"),
  (f"{BENCH} --out pics/a.png", "--out pics/a.png is not an earlier result"),
  # Inputs.
  ("caption --model m --images absent.png", "absent.png is no file"),
  ("reconstruct --model m --images empty --out o", "empty is a folder without images"),
  ("caption --model= --images pics", "argument --model: it is empty"),
  ("status ''", "argument WORKDIR: it is empty"),
  ("serve --model m --host ''", "argument --host: it is empty"),
  (f"{TRAIN} --workdir=w --config.seed=-1", "config.seed = -1: expected 0 or more"),
  (f"{TRAIN} --workdir=w --config.evaluation.seed=5000000000", "config.evaluation.seed = 5000000000"),
  # Options that contradict each other, or do nothing.
  (f"{IMAGES} --seed 1 --seed=2", "--seed is given 2 times"),
  ("convert --source run --target t --to orbax --names official", "--names goes with --to peft"),
  ("convert --source run --target t --to orbax --adapters-only", "--adapters-only goes with --to peft"),
  ("data convert folder:pics --out o --page x.html", "--page goes with inspect"),
  ("data inspect folder:pics --records-per-shard 3", "--records-per-shard goes with convert"),
  (f"{BENCH} --captions captions.jsonl", "--captions goes with --judge-url"),
  (f"{BENCH} --judge-url http://h/v1", "give --embedders for protocol 1, or --judge-url for protocol 2"),
  (f"{JUDGE} --judge-model m --images pics", "--images goes with --embedders"),
  ("bench --references pics --images pics --embedders ''", "give --embedders for protocol 1, or --judge-url"),
  (f"{EVALUATE} --embedders clip=c", "--embedders does nothing with --suite geneval"),
  (f"{EVALUATE} --temperature 0", "--temperature does nothing with --suite geneval"),
  (f"{EVALUATE} --judge-url http://h", "--judge-url does nothing with --suite geneval"),
  (f"{EVALUATE.replace(' --model m', '')} --steps 4", "--steps goes with --model"),
  (
    "evaluate --suite captions --prompts pics --out o --model m --steps 4",
    "--steps does nothing with --suite captions",
  ),
  ("evaluate --suite captions --prompts pics --out o --results pics", "--results does nothing with --suite captions"),
  ("compare a b --gallery 3", "--gallery goes with --page"),
  ("compare a b --suite geneval", "--suite and --prompts go together"),
  (f"{SWEEP} --workdir=s --num=3", "--num goes with --draw"),
  (f"{SWEEP} --workdir=s --keep=0.3", "--keep goes with --halving"),
  (f"{SWEEP} --workdir=s --launcher=x --list", "--list does not go with --launcher"),
]


@pytest.mark.parametrize(("line", "expected"), CALLS, ids=[line for line, _ in CALLS])
def test_a_wrong_call_is_refused_in_one_line(folder, capsys, line, expected):
  before = contents(folder)
  try:
    code = cli.main(shlex.split(line.replace(str(CONFIG), os.path.relpath(CONFIG))))
  except SystemExit as error:
    code = error.code
  captured = capsys.readouterr()
  assert code in (1, 2) and captured.out == ""
  assert expected in captured.err and captured.err.count("\n") == 1, captured.err
  assert contents(folder) == before


def test_earlier_results_are_replaced(folder, capsys):
  """The next check is that of the model."""
  Path("others/images.jsonl").touch()
  for line in (f"{IMAGES} --out captions.jsonl", f"{IMAGES} --out -", f"{GENERATE} --out others"):
    assert cli.main(line.split()) == 1
    assert "the model is loaded" in capsys.readouterr().err
