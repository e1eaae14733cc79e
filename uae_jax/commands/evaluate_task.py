"""The part of `uae-jax evaluate` for suites that are scored here: rows of all items, then scores."""

import argparse
from collections.abc import Sequence
import sys
from typing import Any

from uae_jax.commands import bench, evaluation_settings, model_arguments
from uae_jax.evaluation import results, rows
from uae_jax.evaluation.suites.spec import Prompt, SuiteError
from uae_jax.evaluation.suites.task import Run, Task


def main(arguments: argparse.Namespace, task: Task, prompts: Sequence[Prompt]) -> int:
  """Makes the missing rows if there is a model, scores all rows, writes results.json, prints the table."""
  from uae_jax.commands.evaluate import table

  out = arguments.out
  known = results.read(out)
  if not arguments.model:
    if known is None:
      raise ValueError(f"{out}: no {results.FILE}: --model makes it")
    settings = known["settings"]
    if settings["suite"] != task.name or settings["prompts"] != results.prompts_hash(prompts):
      raise ValueError(f"{out} has suite {settings['suite']}, or other prompts than {arguments.prompts}")
    if arguments.embedders is None:
      arguments.embedders = settings.get("embedders")
  paths = embedder_paths(arguments, task)
  if arguments.model:
    uae = model_arguments.load(arguments)
    embedders = load_embedders(task, paths)
    settings = settings_of(arguments, task, prompts, uae, embedders)
    if known and (changed := results.differences(known["settings"], settings)):
      raise ValueError(f"{out} has results of other settings ({'; '.join(changed)}): choose another --out")
    captions, images = evaluation_settings.options(settings, arguments)
    if "images" in task.makes:
      uae.latents_shape(images["height"], images["width"])  # refuses an impossible size once, not once per item
  else:
    uae, embedders, captions, images = None, {}, {}, {}
  run = Run(
    out=out,
    uae=uae,
    bench=bench.main,
    seed=settings["seed"],
    samples=settings["samples"],
    captions=captions,
    images=images,
    embedders=embedders,
    embedder_paths=paths,
    judge=judge_options(arguments),
  )
  if uae is None:
    made, failed = rows.read(out), known["failed"] if known else {}
  else:
    if known is None:
      results.write(out, settings, {"files": 0, "failed": {}}, None, task.scale)
    made, failed = rows.make(task, run, prompts, arguments.shard, arguments.batch_size or model_arguments.WINDOW)
  wanted = {prompt.key for prompt in prompts}
  done = {key: row for key, row in made.items() if key in wanted}
  scores = task.score(run, prompts, done) if done else None
  about = {
    "files": len(done),
    "failed": failed,
    "prompt_categories": {prompt.key: prompt.category for prompt in prompts}
    | (dict(scores.item_categories) if scores else {}),
    "prompt_texts": {prompt.key: prompt.text for prompt in prompts},
  }
  results.write(out, settings, about, scores, task.scale)
  for key, why in failed.items():
    print(f"uae-jax evaluate: error: {key}: {why}", file=sys.stderr)
  print(table(task, scores, settings) if scores else f"{len(done)} of {len(prompts)} items in {out}")
  return 1 if failed else 0


def settings_of(
  arguments: argparse.Namespace, task: Task, prompts: Sequence[Prompt], uae: Any, embedders: dict[str, Any]
) -> dict[str, Any]:
  """The settings of a task."""
  from uae_jax.weights import checksums

  settings = evaluation_settings.common(arguments, task.name, prompts, uae)
  settings["samples"] = arguments.samples or task.num_samples
  if "captions" in task.makes:
    settings |= evaluation_settings.captions(arguments, task, uae)
  if "images" in task.makes:
    settings |= evaluation_settings.images(arguments, uae)
  if arguments.embedders:
    settings["embedders"] = arguments.embedders
  if embedders:
    settings["embedder_weights"] = {kind: checksums.fingerprint(model.params) for kind, model in embedders.items()}
  return settings


def embedder_paths(arguments: argparse.Namespace, task: Task) -> dict[str, str]:
  """Kind -> path of the embedders that the command line names.

  Raises:
    ValueError: the task needs one and there is none, or the argument is not understood.
  """
  from uae_jax.commands.bench import parse_embedders

  if not arguments.embedders:
    if task.embedders in ("needed", "text"):
      raise SuiteError(f"--suite {task.name} needs --embedders KIND=PATH,...")
    return {}
  return parse_embedders(arguments.embedders)


def load_embedders(task: Task, paths: dict[str, str]) -> dict[str, Any]:
  """Loads what the task itself uses of the embedders."""
  if not task.embedders:
    return {}
  if task.embedders == "text":
    from uae_jax.embedders import text

    return {kind: text.load(kind, path) for kind, path in paths.items()}
  from uae_jax import embedders

  return {kind: embedders.load(kind, path) for kind, path in paths.items()}


def judge_options(arguments: argparse.Namespace) -> dict[str, Any]:
  """Options of protocol 2 of Unified-Bench.

  Raises:
    ValueError: some but not all of them are given.
  """
  found = {name: getattr(arguments, name) for name in ("against", "judge_url", "judge_model")}
  absent = [f"--{name.replace('_', '-')}" for name, value in found.items() if not value]
  if absent and len(absent) < len(found):
    raise SuiteError(f"a judge needs {', '.join(absent)} too")
  return {} if absent else found
