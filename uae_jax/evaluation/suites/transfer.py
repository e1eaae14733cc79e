"""Transfer to other kinds of pictures: a folder per domain, similarity of original and reconstruction per domain.

The score of a picture is the mean of its cosine similarities under the embedders, each of which is a further metric.
Two results, such as before and after RL, are compared with `uae-jax compare`.
"""

from collections.abc import Sequence
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from uae_jax.evaluation.suites import pictures
from uae_jax.evaluation.suites.spec import Prompt, Scores, SuiteError
from uae_jax.evaluation.suites.task import Rows, Run, Task, summarize


def read_prompts(folder: Path) -> list[Prompt]:
  """Reads a folder that has one subfolder per domain.

  Raises:
    SuiteError: a picture is in no subfolder.
  """
  items = pictures.read_folder(folder)
  if outside := [item for item in items if not item.category]:
    raise SuiteError(f"{folder}: {outside[0].key} is in no subfolder; expected one subfolder per domain")
  return items


def work(run: Run, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
  """Rows with `caption`, `reconstruction` and `similarity` by embedder."""
  originals, images, rows = pictures.reconstruct(run, prompts)
  similarity = {
    kind: np.sum(embedder.embed(originals) * embedder.embed(images), axis=-1)
    for kind, embedder in run.embedders.items()
  }
  return [
    row | {"similarity": {kind: float(values[place]) for kind, values in similarity.items()}}
    for place, row in enumerate(rows)
  ]


def score(run: Run, prompts: Sequence[Prompt], rows: Rows) -> Scores:
  """Similarity per domain: the mean of the embedders, then each if there are several."""
  found = {key: row["similarity"] for key, row in rows.items()}
  scores = summarize({key: sum(row.values()) / len(row) for key, row in found.items()}, prompts)
  kinds = list(next(iter(found.values())))
  each = {kind: summarize({key: row[kind] for key, row in found.items()}, prompts) for kind in kinds}
  return dataclasses.replace(scores, metrics=each if len(each) > 1 else {})


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
