"""Fidelity against prompt length: image-text scores of generated images, in bins of the prompt's number of tokens.

The score is the cosine similarity of image and prompt under an embedder with a text tower. What an embedder cuts is
counted; CLIP, for example, reads 77 tokens. The decoder's own conditioning is never cut.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from uae_jax.evaluation.suites import pictures, prompt_files
from uae_jax.evaluation.suites.spec import Prompt, Scores
from uae_jax.evaluation.suites.task import Rows, Run, Task, summarize

# Largest number of tokens of each bin; longer prompts have a bin of their own.
BINS = (16, 32, 64, 128, 256, 512, 1024, 2048)


def bin_of(num_tokens: int) -> str:
  """Name of the bin of a prompt."""
  last = 0
  for bound in BINS:
    if num_tokens <= bound:
      return f"{last + 1} to {bound} tokens"
    last = bound
  return f"over {last} tokens"


def work(run: Run, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
  """Rows with the number of `tokens` of the captioner, `scores`, and `cut`, tokens that an embedder did not read."""
  texts = [prompt.text for prompt in prompts]
  images = run.uae.generate(texts, seed=run.seed, indices=[prompt.index for prompt in prompts], **run.images)
  rows: list[dict[str, Any]] = []
  for prompt, image in zip(prompts, images, strict=True):
    name, tokens = f"{prompt.index:05}.png", len(run.uae.processor.encode(prompt.text))
    pictures.write(run.out / name, image)
    rows.append({"tokens": tokens, "scores": {}, "cut": {}, "files": [name]})
  for kind, embedder in run.embedders.items():
    words, num_tokens = embedder.text.embed(texts)
    similarity = np.sum(embedder.embed(images) * words, axis=-1)
    for row, value, count in zip(rows, similarity, num_tokens, strict=True):
      row["scores"][kind] = float(value)
      row["cut"][kind] = max(0, count - embedder.text.max_tokens)
  return rows


def score(run: Run, prompts: Sequence[Prompt], rows: Rows) -> Scores:
  """Image-text score per bin: of the first embedder, then of the others."""
  kinds = list(next(iter(rows.values()))["scores"])
  bins = {key: bin_of(row["tokens"]) for key, row in rows.items()}
  each = {
    kind: summarize(
      {key: row["scores"][kind] for key, row in rows.items()}, prompts, category=lambda prompt: bins[prompt.key]
    )
    for kind in kinds
  }
  notes = []
  for kind in kinds:
    cut = sum(row["cut"][kind] > 0 for row in rows.values())
    notes.append(f"{kind} read {len(rows) - cut} of {len(rows)} prompts whole, {cut} were cut")
  longest = max(row["tokens"] for row in rows.values())
  notes.append(f"the decoder's conditioning was not cut; the longest prompt has {longest} tokens")
  each = {kind: _by_length(scores) for kind, scores in each.items()}
  first = each.pop(kinds[0])
  return dataclasses.replace(first, notes=(*first.notes, *notes), metrics=each)


def _by_length(scores: Scores) -> Scores:
  """The same scores with the bins in order."""
  names = [bin_of(bound) for bound in (*BINS, BINS[-1] + 1)]
  categories = {name: scores.categories[name] for name in names if name in scores.categories}
  return dataclasses.replace(scores, categories=categories)


SUITE = Task(
  name="text",
  prompts_file="a text file with one prompt per line, or JSON lines with prompt",
  read_prompts=prompt_files.read,
  work=work,
  score=score,
  makes=("images",),
  embedders="text",
  metric="image-text similarity",
)
