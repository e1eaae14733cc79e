"""Transfer to other kinds of pictures: a folder per domain, similarity of original and reconstruction per domain.

The score of a picture is the mean of its cosine similarities under the embedders, each of which is a further metric.
Pictures with ground truth, those of `small_world.domains`, also have recall and precision of their captions, and the
share of their attributes that the reconstruction shows. Two results, such as before and after RL, are compared with
`uae-jax compare`.
"""

from collections.abc import Sequence
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from uae_jax.evaluation.suites import pictures
from uae_jax.evaluation.suites.spec import Prompt, Scores, SuiteError
from uae_jax.evaluation.suites.task import Rows, Run, Task, summarize
from uae_jax.small_world import domains


def read_prompts(folder: Path) -> list[Prompt]:
  """Reads a folder that has one subfolder per domain.

  Raises:
    SuiteError: a picture is in no subfolder.
  """
  items = pictures.read_folder(folder)
  if outside := [item for item in items if not item.category]:
    raise SuiteError(f"{folder}: {outside[0].key} is in no subfolder; expected one subfolder per domain")
  truth = domains.read_truth(folder)
  return [dataclasses.replace(item, record={**item.record, **_known(truth.get(item.key))}) for item in items]


def _known(truth: dict[str, Any] | None) -> dict[str, Any]:
  """What a line of ground truth adds to the record of a picture."""
  if truth is None:
    return {}
  return {"truth": truth} | ({"prompt": truth["prompt"]} if "prompt" in truth else {})


def work(run: Run, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
  """Rows with `caption`, `reconstruction`, `similarity` by embedder, and `truth`, figures by name."""
  originals, images, rows = pictures.reconstruct(run, prompts)
  similarity = {
    kind: np.sum(embedder.embed(originals) * embedder.embed(images), axis=-1)
    for kind, embedder in run.embedders.items()
  }
  return [
    row
    | {"similarity": {kind: float(values[place]) for kind, values in similarity.items()}}
    | ({"truth": domains.figures(truth, row["caption"], np.asarray(image))} if truth else {})
    for place, (row, image) in enumerate(zip(rows, images, strict=True))
    for truth in [prompts[place].record.get("truth")]
  ]


def score(run: Run, prompts: Sequence[Prompt], rows: Rows) -> Scores:
  """Similarity per domain: the mean of the embedders, then each if there are several."""
  found = {key: row["similarity"] for key, row in rows.items()}
  scores = summarize({key: sum(row.values()) / len(row) for key, row in found.items()}, prompts)
  kinds = list(next(iter(found.values())))
  each = {kind: summarize({key: row[kind] for key, row in found.items()}, prompts) for kind in kinds}
  return dataclasses.replace(scores, metrics=(each if len(each) > 1 else {}) | truth_scores(prompts, rows))


def truth_scores(prompts: Sequence[Prompt], rows: Rows) -> dict[str, Scores]:
  """The figures of pictures with ground truth; those of captions without given prompts."""
  known = {prompt.key: rows[prompt.key]["truth"] for prompt in prompts if "truth" in rows.get(prompt.key, {})}
  own = {prompt.key for prompt in prompts if "prompt" not in prompt.record}
  found = {}
  for name in next(iter(known.values()), {}):
    keys = own if name.startswith("caption") else known.keys()
    values = {key: row[name] for key, row in known.items() if key in keys}
    if values:
      found[name] = summarize(values, [prompt for prompt in prompts if prompt.key in values])
  return found


SUITE = Task(
  name="transfer",
  prompts_file="a folder with one subfolder of pictures per domain",
  read_prompts=read_prompts,
  work=work,
  score=score,
  makes=("captions", "images"),
  embedders="needed",
  metric="mean similarity",
)
