"""`uae-jax caption`, `generate` and `reconstruct` in two processes write the files that they write in one."""

import numpy as np
from PIL import Image
import pytest

from tests.end_to_end.test_evaluate_processes import FLAGS, contents
from tests.end_to_end.test_processes import finish, start
from tests.properties import finished_run

OPTIONS = {
  "caption": ("--max-new-tokens=2",),
  "generate": ("--steps=1",),
  "reconstruct": ("--max-new-tokens=2", "--steps=1"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """Workdir of a small-world run with random weights."""
  workdir = tmp_path_factory.mktemp("model") / "run"
  finished_run.write(workdir, finished_run.smoke_config())
  return workdir


@pytest.fixture(scope="module")
def items(tmp_path_factory):
  """Three pictures or prompts, of which the second is bad: (folder of pictures, file of prompts)."""
  folder = tmp_path_factory.mktemp("items")
  pictures, prompts = folder / "pictures", folder / "prompts.jsonl"
  pictures.mkdir()
  rng = np.random.default_rng(0)
  for name in ("a", "c"):
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(pictures / f"{name}.png")
  (pictures / "b.png").write_text("no picture")
  prompts.write_text('{"prompt": "black background ;"}\n{"text": "b"}\n{"prompt": "gray background ;"}\n')
  return pictures, prompts


def words(command, model, items, out):
  """The command line, in batches of one."""
  source = f"--prompts={items[1]}" if command == "generate" else f"--images={items[0]}"
  target = out / "captions.jsonl" if command == "caption" else out
  return "uae_jax.cli", command, source, f"--model={model}", f"--out={target}", "--batch-size=1", *OPTIONS[command]


@pytest.mark.parametrize(
  "command",
  ["reconstruct", pytest.param("caption", marks=pytest.mark.slow), pytest.param("generate", marks=pytest.mark.slow)],
)
def test_two_processes_write_what_one_writes(command, model, items, tmp_path):
  """A bad item is one line of one process, and the exit code of both is 1."""
  alone, together = tmp_path / "alone", tmp_path / "together"
  finish(start(*words(command, model, items, alone), count=1), code=1)
  outputs = finish(start(*words(command, model, items, together), *FLAGS), code=1)
  assert len(contents(alone)) == {"caption": 2, "generate": 4, "reconstruct": 5}[command]
  assert contents(together) == contents(alone)
  bad = "prompts.jsonl:2" if command == "generate" else "b.png"
  assert [bad in line for output in outputs for line in output.splitlines() if "error:" in line] == [True]
  assert [any(line.startswith(str(together)) for line in output.splitlines()) for output in outputs] == [True, False]
  assert len(list(together.glob("*.unfinished/items-?-of-2.jsonl"))) == 1


def test_what_fails_in_one_process_ends_both(model, items, tmp_path):
  """Process 1 does not find the model, which process 0 has loaded by then."""
  (tmp_path / "model-0").symlink_to(model)
  outputs = finish(start(*words("caption", tmp_path / "model-PROCESS_ID", items, tmp_path), *FLAGS), code=1)
  lines = [[line for line in output.splitlines() if "error:" in line] for output in outputs]
  assert [len(found) for found in lines] == [1, 1]
  assert "process 1 failed: " in lines[0][0] and all("model-1" in found[0] for found in lines)
