"""The part of `uae-jax evaluate` for suites that are scored here: rows of all items, then scores."""

import argparse
from collections.abc import Sequence
from typing import Any

from uae_jax import outputs
from uae_jax.commands import bench, model_arguments
from uae_jax.evaluation import results, rows, tasks
from uae_jax.evaluation import settings as evaluation_settings
from uae_jax.evaluation.suites.spec import Prompt, SuiteError
from uae_jax.evaluation.suites.task import Run, Task


def main(arguments: argparse.Namespace, task: Task, prompts: Sequence[Prompt]) -> int:
  """Makes the missing rows if there is a model, scores all rows, writes results.json, prints the table."""
  from uae_jax.commands.evaluate import print_failures, table
  from uae_jax.training import processes

  out = arguments.out
  known = processes.value_of_first(lambda: results.read(out))
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
    captions, images = evaluation_settings.options(settings, arguments.batch_size, model_arguments.WINDOW)
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
    failed = known["failed"] if known else {}
  else:
    if known is None:
      earlier = [file.name for file in out.glob("items*.jsonl")]
      processes.on_first(lambda: outputs.require_own(out, "--out", results.FILE, earlier))
      processes.on_first(lambda: results.write(out, settings, {"files": 0, "failed": {}}, None, task.scale))
    failed = make(arguments, task, run, prompts)

  def finish() -> None:
    made = rows.read(out) if uae is None else rows.whole(out)
    scores, count = tasks.finish(task, run, prompts, made, failed, settings)
    print_failures(failed)
    print(table(task, scores, settings) if scores else f"{count} of {len(prompts)} items in {out}")

  processes.on_first(finish)
  return 1 if failed else 0


def make(arguments: argparse.Namespace, task: Task, run: Run, prompts: Sequence[Prompt]) -> dict[str, str]:
  """Makes the missing rows, which several processes share; returns error messages by key."""
  import jax

  from uae_jax.training import processes

  part, parts = shard = arguments.shard

  def missing() -> list[str]:
    whole = rows.whole(run.out)
    return [prompt.key for prompt in prompts[part::parts] if prompt.key not in whole]

  # Process 0 says what is missing, because the others may see rows that were written since.
  wanted = set(processes.value_of_first(missing))
  jobs = processes.share([prompt for prompt in prompts if prompt.key in wanted])
  if jax.process_count() > 1:
    shard = jax.process_index(), jax.process_count()
  failed = rows.make(task, run, jobs, shard, arguments.batch_size or model_arguments.WINDOW)
  return processes.merge(failed)


def settings_of(
  arguments: argparse.Namespace, task: Task, prompts: Sequence[Prompt], uae: Any, embedders: dict[str, Any]
) -> dict[str, Any]:
  """The settings of a task."""
  from uae_jax.weights import checksums

  settings = evaluation_settings.of_task(vars(arguments), task, prompts, uae, uae.fingerprint())
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
  from uae_jax.training import restore

  return {kind: restore.load_embedder(kind, path) for kind, path in paths.items()}


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
