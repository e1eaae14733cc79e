"""GenEval++: 280 prompts in seven categories, one sample each.

Source: yejy53/Echo-4o, `test_scripts/Eval-gpt-4.1-geneval++.py`. The scorer opens `<line number from 1>.jpg` and writes
`Output.json`; a row that could not be judged has `correct` -1 and counts as wrong there, as here.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from uae_jax.evaluation.suites import geneval
from uae_jax.evaluation.suites.spec import (
  Prompt,
  Scores,
  Suite,
  SuiteError,
  category_scores,
  field,
  one_sample,
  read_json,
)

TAGS = (
  "color_attr",
  "counting",
  "color_count_attr",
  "color_spatial_attr",
  "size_spatial_attr",
  "multi_object_count_attr",
  "spatial_count_attr",
)


def read_results(paths: Sequence[Path], prompts: Sequence[Prompt]) -> Scores:
  values, unjudged = defaultdict(list), 0
  texts = {prompt.key: prompt.text for prompt in prompts}
  for path in paths:
    document = read_json(path)
    rows = field(str(path), document if isinstance(document, dict) else {}, "overall_results", list)
    for number, row in enumerate(rows, 1):
      place = f"{path}, result {number}"
      key = str(field(place, row, "id", int) - 1)
      if key in texts and texts[key] != field(place, row, "prompt", str).strip():
        raise SuiteError(f"{place}: id {row['id']} has the prompt of another run: {row['prompt']!r}")
      correct = field(place, field(place, row, "result", dict), "correct", int)
      unjudged += correct < 0
      values[key].append(float(correct == 1))
  scores = category_scores(values, prompts)
  note = (f"{unjudged} images were not judged; the official score counts them as wrong",) if unjudged else ()
  return Scores(scores.items, scores.categories, scores.overall, (*scores.notes, *note))


SUITE = Suite(
  name="geneval_plus",
  prompts_file="Geneval++.jsonl",
  num_prompts=280,
  num_samples=1,
  read_prompts=lambda file: geneval.read_prompts(file, TAGS),
  targets=one_sample("geneval_plus", lambda prompt: f"{prompt.index + 1}.jpg"),
  result_files=lambda out: sorted(out.glob("Output.json")),
  read_results=read_results,
  published={"UAE": 0.475},  # arXiv 2509.09666
)
