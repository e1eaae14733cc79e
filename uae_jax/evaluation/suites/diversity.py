"""Statistics of K samples per prompt that show reward hacking: blur, grids, empty backgrounds, samples that are alike.

Formulas are in `evaluation.image_statistics`. Embedders are optional: each adds the mean distance of the samples of a
prompt.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from uae_jax.evaluation import generation
from uae_jax.evaluation.image_statistics import STATISTICS, pairwise_distance
from uae_jax.evaluation.suites import pictures, prompt_files
from uae_jax.evaluation.suites.spec import Prompt, Scores
from uae_jax.evaluation.suites.task import Rows, Run, Task, summarize

PRIMARY = next(iter(STATISTICS))


def work(run: Run, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
  """Rows with the mean of each statistic over the samples of a prompt; writes the samples."""
  shape = run.uae.latents_shape(run.images["height"], run.images["width"])
  pairs = [(prompt, sample) for prompt in prompts for sample in range(run.samples)]
  latents = np.stack([generation.noise(run.seed, prompt, sample, shape) for prompt, sample in pairs])
  images = run.uae.generate([prompt.text for prompt, _ in pairs], latents=latents, **run.images)
  rows = []
  for place, prompt in enumerate(prompts):
    group = images[place * run.samples : (place + 1) * run.samples]
    names = [f"{prompt.index:05}/{sample:04}.png" for sample in range(run.samples)]
    for name, image in zip(names, group, strict=True):
      pictures.write(run.out / name, image)
    row: dict[str, Any] = {
      name: float(np.mean([one(np.asarray(image)) for image in group])) for name, one in STATISTICS.items()
    }
    if run.samples > 1:
      distances = {kind: pairwise_distance(embedder.embed(group)) for kind, embedder in run.embedders.items()}
      row |= {f"{kind} distance": value for kind, value in distances.items()}
    rows.append(row | {"files": names})
  return rows


def score(run: Run, prompts: Sequence[Prompt], rows: Rows) -> Scores:
  """The mean of each statistic over the prompts."""
  names = [name for name in next(iter(rows.values())) if name not in ("key", "files")]
  each = {name: summarize({key: row[name] for key, row in rows.items()}, prompts) for name in names}
  first = each.pop(PRIMARY)
  return dataclasses.replace(first, metrics=each)


SUITE = Task(
  name="diversity",
  prompts_file="a text file with one prompt per line, or JSON lines with prompt",
  read_prompts=prompt_files.read,
  work=work,
  score=score,
  makes=("images",),
  embedders="used",
  num_samples=4,
  metric=PRIMARY,
)
