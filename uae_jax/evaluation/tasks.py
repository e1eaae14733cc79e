"""Scores the rows of a suite that is scored here, and writes its `results.json`."""

from collections.abc import Mapping, Sequence
from typing import Any

from uae_jax.evaluation import results
from uae_jax.evaluation.suites.spec import Prompt, Scores
from uae_jax.evaluation.suites.task import Rows, Run, Task


def finish(
  task: Task,
  run: Run,
  prompts: Sequence[Prompt],
  rows: Rows,
  failed: Mapping[str, str],
  settings: Mapping[str, Any],
) -> tuple[Scores | None, int]:
  """Scores all rows and writes the result.

  Args:
    task: the suite.
    run: model and options.
    prompts: all items; scores do not depend on the order of the rows.
    rows: rows by key; those of other items are ignored.
    failed: error messages by key.
    settings: result of `settings.of_task`, with embedders.

  Returns:
    (scores, or None if there is nothing to score; number of items with a row).
  """
  done = {prompt.key: rows[prompt.key] for prompt in prompts if prompt.key in rows}
  scores = task.score(run, prompts, done) if done else None
  about = {
    "files": len(done),
    "failed": dict(failed),
    "prompt_categories": {prompt.key: prompt.category for prompt in prompts}
    | (dict(scores.item_categories) if scores else {}),
    "prompt_texts": {prompt.key: prompt.text for prompt in prompts},
    "prompt_files": {key: list(row.get("files", ())) for key, row in done.items()},
  }
  results.write(run.out, settings, about, scores, task.scale)
  return scores, len(done)
