"""WISE_Verified: 1000 prompts that need world knowledge, one sample each.

Source: PKU-YuanGroup/WISE, `vllm_eval.py` and `calculate_verified.py`. The scorer opens `<prompt_id>.png` and writes
`*_scores_results.jsonl` with a score of 0 or 1 per prompt. The category follows from the id.
"""

from collections.abc import Sequence
from pathlib import Path

from uae_jax.evaluation.suites.spec import (
  Prompt,
  Scores,
  Suite,
  SuiteError,
  category_scores,
  field,
  json_lines,
  one_sample,
  read_json,
  unique,
)

# Last prompt_id of each category, and its weight in the overall score.
CATEGORIES = {
  "CULTURE": (400, 0.40),
  "TIME": (520, 0.12),
  "SPACE": (640, 0.12),
  "BIOLOGY": (760, 0.12),
  "PHYSICS": (880, 0.12),
  "CHEMISTRY": (1000, 0.12),
}


def read_prompts(path: Path) -> list[Prompt]:
  """Reads `data_verified/merge.json`, or the three files of the folder `data_verified`."""
  paths = sorted(path.glob("*_verified.json")) if path.is_dir() else [path]
  prompts = []
  for file in paths:
    rows = read_json(file)
    for position, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
      place = f"{file}, record {position}"
      row = row if isinstance(row, dict) else {}
      identifier, text = field(place, row, "prompt_id", int), field(place, row, "Prompt", str)
      if not 1 <= identifier <= 1000:
        raise SuiteError(f"{place}: prompt_id {identifier}, expected 1 to 1000")
      category = next(name for name, (last, _) in CATEGORIES.items() if identifier <= last)
      prompts.append(Prompt(str(identifier), identifier - 1, text.strip(), category, row))
  return unique(sorted(prompts, key=lambda prompt: prompt.index), path)


def read_results(paths: Sequence[Path], prompts: Sequence[Prompt]) -> Scores:
  values: dict[str, list[float]] = {}
  for path in paths:
    for place, row in json_lines(path):
      key, score = str(field(place, row, "prompt_id", int)), field(place, row, "score", (int, float))
      if score not in (0, 1):
        raise SuiteError(f"{place}: score {score}, expected 0 or 1: is it a file of the original WISE?")
      if key in values:
        raise SuiteError(f"{place}: prompt_id {key} is scored twice")
      values[key] = [float(score)]
  scores = category_scores(values, prompts)
  weights = {name: CATEGORIES[name][1] for name in scores.categories}
  overall = sum(weights[name] * value for name, value in scores.categories.items()) / sum(weights.values())
  absent = [name for name in CATEGORIES if name not in scores.categories]
  note = (f"no score in {', '.join(absent)}: the overall score weighs the other categories only",) if absent else ()
  return Scores(scores.items, scores.categories, overall, (*scores.notes, *note))


SUITE = Suite(
  name="wise",
  prompts_file="WISE's data_verified/merge.json, or the folder data_verified",
  num_prompts=1000,
  num_samples=1,
  read_prompts=read_prompts,
  targets=one_sample("wise", lambda prompt: f"{prompt.key}.png"),
  result_files=lambda out: sorted(out.glob("**/*_scores_results.jsonl")),
  read_results=read_results,
)
