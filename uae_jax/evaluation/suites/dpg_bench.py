"""DPG-Bench: 1065 dense prompts, four samples each, tiled 2 x 2.

Source: TencentQQGYLab/ELLA, `dpg_bench/compute_dpg_bench.py`. The scorer opens every file of the folder, looks its
name before the first dot up in `dpg_bench.csv`, and crops tiles of `--resolution` in the order top-left, top-right,
bottom-left, bottom-right. It writes `dpg-bench_<time>_results.txt`: a row per image, then the tables.
"""

from collections.abc import Sequence
from pathlib import Path
import re

from uae_jax import files
from uae_jax.evaluation.suites.spec import (
  Prompt,
  Scores,
  Suite,
  SuiteError,
  Target,
  field,
  json_lines,
  missing_note,
  number,
  unique,
)

NUM_TILES = 4
# The path of an image may contain commas.
ROW = re.compile(r"(?P<image>.+?)(, [-+.\de]+)+, (?P<mean>[-+.\de]+)\s*")


def read_prompts(path: Path) -> list[Prompt]:
  """Reads the folder `dpg_bench/prompts` of .txt files, or a JSON lines file with `id` and `prompt`."""
  if path.is_dir():
    named = [(file.stem, "\n".join(files.read_lines(file))) for file in sorted(path.glob("*.txt"))]
  else:
    named = [(field(place, row, "id", str), field(place, row, "prompt", str)) for place, row in json_lines(path)]
  for key, text in named:
    # The scorer cuts the name at the first dot.
    if not key or not text.strip() or set(key) & set("./\\"):
      raise SuiteError(f"{path}: prompt {key!r} is empty or has a name that the scorer cannot open")
  return unique([Prompt(key, index, text.strip()) for index, (key, text) in enumerate(sorted(named))], path)


def targets(prompt: Prompt, num_samples: int) -> list[Target]:
  if num_samples not in (1, NUM_TILES):
    raise SuiteError(f"--samples {num_samples}: DPG-Bench scores grids of {NUM_TILES} or single images (--pic-num)")
  return [Target(f"{prompt.key}.png", tuple(range(num_samples)))]


def read_results(paths: Sequence[Path], prompts: Sequence[Prompt]) -> Scores:
  if len(paths) > 1:
    raise SuiteError(f"{len(paths)} result files ({paths[0].name}, ...): name one of them with --results")
  path, items, categories, overall = paths[0], {}, {}, None
  known, in_table = {prompt.key for prompt in prompts}, False
  for line_number, line in enumerate(files.read_lines(path), 1):
    place = f"{path}, line {line_number}"
    if line.startswith("DPG-Bench score:"):
      overall = number(place, line.rpartition(":")[2]) / 100
    elif line.startswith(("L1 category scores:", "L2 category scores:", "Model:", "Image path:", "Save results to:")):
      in_table = line.startswith("L1")
    elif line.startswith("\t"):
      name, _, value = line.strip().rpartition(":")
      if in_table:
        categories[name] = number(place, value) / 100
    elif line.strip():
      row = ROW.fullmatch(line)
      if row is None:
        raise SuiteError(f"{place}: expected an image, its scores and their mean, found {line[:80]!r}")
      key = Path(row["image"]).name.split(".")[0]
      if key not in known:
        raise SuiteError(f"{place}: {row['image']} is no prompt of this run: are the results of another run?")
      items[key] = number(place, row["mean"])
  if overall is None:
    raise SuiteError(f"{path}: no line 'DPG-Bench score: ...': is the scorer still running?")
  missing = [prompt.key for prompt in prompts if prompt.key not in items]
  return Scores(items, categories, overall, tuple(missing_note(missing, len(prompts))))


SUITE = Suite(
  name="dpg_bench",
  prompts_file="the folder dpg_bench/prompts of ELLA, or a JSON lines file with id and prompt",
  num_prompts=1065,
  num_samples=NUM_TILES,
  read_prompts=read_prompts,
  targets=targets,
  result_files=lambda out: sorted(out.glob("dpg-bench_*_results.txt")),
  read_results=read_results,
  scale=100.0,
  published={"UAE": 84.74},  # arXiv 2509.09666
  is_square=True,
)
