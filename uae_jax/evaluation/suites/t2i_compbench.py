"""T2I-CompBench: eight categories of compositional prompts, ten samples each.

Source: Karine-Huang/T2I-CompBench. Each category has its own folder with `samples/<prompt>_<number>.png`; the six
digits count the images of the category. Every scorer writes a `vqa_result.json` of question ids, which count the images
in that order.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from uae_jax import files
from uae_jax.evaluation.suites.spec import (
  Prompt,
  Scores,
  Suite,
  SuiteError,
  Target,
  category_scores,
  field,
  number,
  read_json,
  unique,
)

NUM_SAMPLES = 10
# Category -> folder, below the category's own, in which its official scorer writes vqa_result.json.
RESULTS = {
  "color": "annotation_blip",
  "shape": "annotation_blip",
  "texture": "annotation_blip",
  "spatial": "labels/annotation_obj_detection_2d",
  "3d_spatial": "labels/annotation_obj_detection_3d",
  "numeracy": "annotation_num",
  "non_spatial": "annotation_clip",
  "complex": "annotation_3_in_1",
}


def read_prompts(path: Path) -> list[Prompt]:
  """Reads `<category>_val.txt`, or all of them in the folder `examples/dataset`."""
  if path.is_dir():
    paths = [path / f"{name}_val.txt" for name in RESULTS if (path / f"{name}_val.txt").is_file()]
  else:
    paths = [path]
  prompts: list[Prompt] = []
  for file in paths:
    category = file.stem.removesuffix("_val")
    if category not in RESULTS:
      raise SuiteError(f"{file}: expected <category>_val.txt with a category of {', '.join(RESULTS)}")
    # A line may carry further columns, which the official scripts cut at the tab.
    texts = [line.split("\t")[0].strip() for line in files.read_lines(file)]
    for position, text in enumerate(text for text in texts if text):
      prompts.append(Prompt(f"{category}/{position}", len(prompts), text, category))
  return unique(prompts, path)


def targets(prompt: Prompt, num_samples: int) -> list[Target]:
  first = int(prompt.key.rpartition("/")[2]) * num_samples
  # The scorer takes the text before the first underscore as the prompt; a file name cannot hold a slash.
  name = prompt.text.replace("/", " ").replace("_", " ").encode()[:200].decode(errors="ignore")
  return [
    Target(f"{prompt.category}/samples/{name}_{first + sample:06}.png", (sample,)) for sample in range(num_samples)
  ]


def read_results(paths: Sequence[Path], prompts: Sequence[Prompt]) -> Scores:
  values: dict[str, list[float]] = defaultdict(list)
  counts: dict[str, int] = defaultdict(int)
  for prompt in prompts:
    counts[prompt.category] += 1
  for path in paths:
    category = next((part for part in reversed(path.parts[:-1]) if part in RESULTS), None)
    if category is None:
      raise SuiteError(f"{path}: no folder of this path is a category ({', '.join(RESULTS)})")
    if category not in counts:
      raise SuiteError(f"{path}: no prompt of this run is of category {category}")
    rows = read_json(path)
    rows = rows if isinstance(rows, list) else [rows]
    per_prompt, rest = divmod(len(rows), counts[category])
    if rest or not per_prompt:
      raise SuiteError(f"{path}: {len(rows)} rows for {counts[category]} prompts: the scorer missed images")
    for position, row in enumerate(rows):
      place = f"{path}, row {position + 1}"
      image = field(place, row if isinstance(row, dict) else {}, "question_id", int)
      values[f"{category}/{image // per_prompt}"].append(number(place, row.get("answer")))
  return category_scores(values, prompts)


SUITE = Suite(
  name="t2i_compbench",
  prompts_file="a <category>_val.txt of T2I-CompBench, or its folder examples/dataset",
  num_prompts=2400,
  num_samples=NUM_SAMPLES,
  read_prompts=read_prompts,
  targets=targets,
  result_files=lambda out: [
    file for name, folder in RESULTS.items() if (file := out / name / folder / "vqa_result.json").is_file()
  ],
  read_results=read_results,
)
