"""`uae-jax evaluate` in two processes writes the files that it writes in one."""

import json

import numpy as np
from PIL import Image
import pytest

from tests.end_to_end.test_processes import finish, start
from tests.properties import finished_run

PICTURES = 2
FLAGS = ("--coordinator=COORDINATOR", "--num_processes=2", "--process_id=PROCESS_ID")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """Workdir of a small-world run with random weights."""
  workdir = tmp_path_factory.mktemp("model") / "run"
  finished_run.write(workdir, finished_run.smoke_config())
  return workdir


def evaluate(suite, prompts, model, out, processes) -> list[str]:
  """Runs the command in one or two processes, in batches of one; returns what each printed."""
  command = ("uae_jax.cli", "evaluate", f"--suite={suite}", f"--prompts={prompts}", f"--model={model}", f"--out={out}")
  options = ("--batch-size=1", "--steps=1", *(("--max-new-tokens=2",) if suite == "unified_bench" else ()))
  return finish(start(*command, *options, *(FLAGS if processes == 2 else ()), count=processes))


def contents(folder) -> dict:
  """Path -> bytes of all files but the rows, whose files are those of the processes."""
  files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("items")]
  return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("suite", ["unified_bench", pytest.param("geneval", marks=pytest.mark.slow)])
def test_two_processes_write_what_one_writes(suite, model, tmp_path):
  """Captions and reconstructions of a suite that is scored here, and images of one with an official scorer."""
  prompts = tmp_path / "prompts"
  if suite == "geneval":
    rows = [{"tag": "counting", "include": [], "prompt": f"{color} background ;"} for color in ("black", "gray")]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
  else:
    prompts.mkdir()
    rng = np.random.default_rng(0)
    for number in range(PICTURES):
      Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(prompts / f"{number}.png")
  alone, together = tmp_path / "alone", tmp_path / "together"
  evaluate(suite, prompts, model, alone, 1)
  outputs = evaluate(suite, prompts, model, together, 2)
  assert contents(together) == contents(alone)
  assert [" in " in output.splitlines()[0] or str(together) in output for output in outputs] == [True, False]
  shares = [len(file.read_text().splitlines()) for file in together.glob("items-?-of-2.jsonl")]
  assert shares == ([PICTURES // 2] * 2 if suite == "unified_bench" else [])
