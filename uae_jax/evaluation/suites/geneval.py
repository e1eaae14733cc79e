"""GenEval: 553 prompts in six categories, four samples each.

Source: djghosh13/geneval. The scorer opens the folders whose name is a number; in each, `metadata.jsonl` and
`samples/<number>.png`. It writes `results.jsonl` with one row per image. The overall score is the mean of the
categories' shares of correct images.
"""

from collections import defaultdict
from collections.abc import Sequence
import json
from pathlib import Path, PurePosixPath

from uae_jax.evaluation.suites.spec import (
  Prompt,
  Scores,
  Suite,
  SuiteError,
  Target,
  category_scores,
  field,
  json_lines,
  unique,
)

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def read_prompts(file: Path, tags: Sequence[str] = TAGS) -> list[Prompt]:
  """Reads `evaluation_metadata.jsonl`."""
  prompts: list[Prompt] = []
  for place, record in json_lines(file):
    text, tag = field(place, record, "prompt", str), field(place, record, "tag", str)
    field(place, record, "include", list)
    if tag not in tags:
      raise SuiteError(f"{place}: category {tag!r}, expected one of {', '.join(tags)}: the file of another benchmark?")
    prompts.append(Prompt(str(len(prompts)), len(prompts), text.strip(), tag, record))
  return unique(prompts, file)


def targets(prompt: Prompt, num_samples: int) -> list[Target]:
  return [Target(f"{prompt.index:05}/samples/{sample:04}.png", (sample,)) for sample in range(num_samples)]


def read_results(paths: Sequence[Path], prompts: Sequence[Prompt]) -> Scores:
  values = defaultdict(list)
  texts = {prompt.key: prompt.text for prompt in prompts}
  for path in paths:
    for place, row in json_lines(path):
      name = PurePosixPath(field(place, row, "filename", str))
      folder = name.parent.parent.name
      if not folder.isdigit():
        raise SuiteError(f"{place}: {name} is not <index>/samples/<number>.png")
      key = str(int(folder))
      if key in texts and texts[key] != field(place, row, "prompt", str).strip():
        raise SuiteError(f"{place}: folder {folder} has the prompt of another run: {row['prompt']!r}")
      values[key].append(float(field(place, row, "correct", bool)))
  return category_scores(values, prompts)


SUITE = Suite(
  name="geneval",
  prompts_file="GenEval's evaluation_metadata.jsonl",
  num_prompts=553,
  num_samples=4,
  read_prompts=read_prompts,
  targets=targets,
  texts=lambda prompt: {f"{prompt.index:05}/metadata.jsonl": json.dumps(prompt.record, ensure_ascii=False)},
  result_files=lambda out: sorted(out.glob("results.jsonl")),
  read_results=read_results,
  # arXiv 2509.09666; the second with rewritten prompts.
  published={"UAE": 0.86, "UAE, rewritten prompts": 0.89},
)
