"""`uae-jax evaluate`: the files that a benchmark's official scorer opens, scores, and their table."""

import argparse
from pathlib import Path
import re
import sys

from uae_jax import cloud_storage, files, outputs
from uae_jax.commands import command_line, model_arguments
from uae_jax.commands.command_line import input_path, output_path
from uae_jax.evaluation import settings as evaluation_settings
from uae_jax.evaluation.suites.task import Task

EPILOG = """
The images are made with --model. Then the benchmark's own scorer is run on the output folder, and
`uae-jax evaluate --suite NAME --prompts FILE --out DIR` without --model reads what it wrote. Suites that are scored
here print their table at once. The same command goes on where a killed one stopped. Several processes share the work as
those of `uae-jax train` do: run the same command in each of them, on a DIR that all of them can access.
docs/evaluation.md has every suite from download to table.
"""


def parser() -> command_line.Parser:
  from uae_jax.evaluation.suites import SUITES  # imports no JAX

  parser = command_line.Parser("evaluate", "Runs a benchmark on a model, and prints its table.", EPILOG)
  suites = "; ".join(f"{name}: {summary}" for name, summary in SUITES.items())
  parser.add_argument("--suite", metavar="NAME[:PATH]", help=f"with the path of --prompts or without; {suites}")
  parser.add_argument(
    "--prompts",
    type=input_path,
    metavar="PATH",
    help="the benchmark's own prompts, questions or pictures: a file or folder",
  )
  parser.add_argument(
    "--out", required=True, type=output_path, metavar="DIR", help="output folder: files and results.json"
  )
  parser.add_argument(
    "--results", nargs="+", type=input_path, metavar="FILE", help="result files of the scorer; default: in DIR"
  )
  parser.add_argument(
    "--like", type=input_path, metavar="FILE", help="results.json whose suite and settings are repeated"
  )
  model_arguments.add_model_arguments(parser, is_required=False)
  parser.set_defaults(seed=None)  # A given seed is more than that of --like.
  parser.add_argument("--limit", type=model_arguments.positive, help="use the first N prompts only")
  parser.add_argument(
    "--samples", type=model_arguments.positive, help="samples per prompt; default: the benchmark's own"
  )
  parser.add_argument(
    "--shard",
    type=shard,
    default=(0, 1),
    metavar="I/N",
    help="make part I (from 0) of N in a process of its own, which knows nothing of the others; default 0/1",
  )
  command_line.add_process_arguments(parser)
  model_arguments.add_generation_arguments(parser)
  model_arguments.add_caption_arguments(parser)
  parser.add_argument(
    "--embedders",
    metavar="KIND=PATH,...",
    help="checkpoints of the embedders that measure images, as in uae-jax bench; or a run, for the embedders of it",
  )
  judge = parser.add_argument_group("unified_bench, protocol 2: a judge model compares captions; see uae-jax bench")
  judge.add_argument("--against", type=input_path, metavar="FILE", help="captions of the other system")
  judge.add_argument("--judge-url", metavar="URL", help="OpenAI-compatible endpoint")
  judge.add_argument("--judge-model", action="append", metavar="NAME", help="may be repeated")
  return parser


def shard(text: str) -> tuple[int, int]:
  match = re.fullmatch(r"(\d+)/(\d+)", text)
  if not match or int(match[1]) >= int(match[2]):
    raise argparse.ArgumentTypeError(f"{text}: expected I/N with I from 0 to N - 1")
  return int(match[1]), int(match[2])


def main(argv: list[str]) -> int:
  commands = parser()
  arguments = commands.parse_args(argv)

  from uae_jax.training import processes

  join(arguments)
  with processes.together():
    return run(commands, arguments)


def run(commands: command_line.Parser, arguments: argparse.Namespace) -> int:
  from uae_jax.commands import evaluate_task
  from uae_jax.evaluation import results, suites
  from uae_jax.training import processes

  out = arguments.out
  if arguments.suite and ":" in arguments.suite:
    arguments.suite, _, prompts_path = arguments.suite.partition(":")
    arguments.prompts = arguments.prompts or Path(cloud_storage.fetched(files.input_path(prompts_path)))
  given = argparse.Namespace(**vars(arguments))
  if arguments.like:
    take_settings(arguments, arguments.like)
  arguments.seed = arguments.seed or 0
  if not arguments.suite or not arguments.prompts:
    raise ValueError("--suite and --prompts are both needed")
  suite = suites.find(arguments.suite)
  refuse_unused(commands, given, suite)
  prompts_file = arguments.prompts
  if not prompts_file.exists():
    raise ValueError(f"--prompts {prompts_file}: no such file; expected {suite.prompts_file}")
  prompts = suite.read_prompts(prompts_file)[: arguments.limit]
  if arguments.model:
    processes.on_first(lambda: outputs.require_folder(out, "--out"))
  if isinstance(suite, Task):
    return evaluate_task.main(arguments, suite, prompts)
  if not arguments.limit and len(prompts) != suite.num_prompts:
    print(f"note: {prompts_file} has {len(prompts)} prompts, the official list {suite.num_prompts}", file=sys.stderr)
  known = processes.value_of_first(lambda: results.read(out))
  if arguments.model:
    settings, failed, number, is_changed = generate(arguments, suite, prompts, out, known)
  elif known is None:
    raise ValueError(f"{out}: no {results.FILE}: --model makes the images first")
  else:
    settings, failed, number, is_changed = known["settings"], known["failed"], known["files"], False
    if settings["suite"] != suite.name or settings["prompts"] != results.prompts_hash(prompts):
      raise ValueError(f"{out} has images of suite {settings['suite']} or of other prompts than {prompts_file}")

  def finish() -> None:
    paths = arguments.results or suite.result_files(out)
    scores = suite.read_results(paths, prompts) if paths else None
    about = {
      "files": number,
      "failed": failed,
      "official_results": [str(file) for file in paths],
      "prompt_categories": {prompt.key: prompt.category for prompt in prompts},
      "prompt_texts": {prompt.key: prompt.text for prompt in prompts},
      "prompt_files": {
        prompt.key: [target.file for target in suite.targets(prompt, settings["samples"])] for prompt in prompts
      },
    }
    if not paths and known and "scores" in known and not is_changed:
      # Its result files were named by --results, and the images are still those that were scored.
      about.update({name: known[name] for name in ("official_results", "scores")})
    results.write(out, settings, about, scores, suite.scale)
    if arguments.model:
      print_failures(failed)
    print(table(suite, scores, settings) if scores else f"{number} files in {out}; now run the official scorer on it")

  processes.on_first(finish)
  return 1 if arguments.model and failed else 0


def refuse_unused(commands: command_line.Parser, given: argparse.Namespace, suite) -> None:
  """Refuses options that this suite, or a call without a model, would ignore; `suite` is a `Suite` or `Task`."""
  is_task = isinstance(suite, Task)
  makes = suite.makes if is_task else ("images",)
  unused = {
    evaluation_settings.IMAGES: "images" not in makes,
    evaluation_settings.CAPTIONS: "captions" not in makes,
    ("embedders",): not (is_task and (suite.embedders or suite.runs_bench)),
    ("against", "judge_url", "judge_model"): not (is_task and suite.runs_bench),
    ("results",): is_task,
  }
  for names, is_unused in unused.items():
    if is_unused:
      commands.refuse_unused(given, names, f"does nothing with --suite {suite.name}")
  if not given.model:
    made = (
      "seed",
      "samples",
      "dtype",
      "int8",
      "batch_size",
      *evaluation_settings.IMAGES,
      *evaluation_settings.CAPTIONS,
    )
    commands.refuse_unused(given, made, "goes with --model")


def join(arguments: argparse.Namespace) -> None:
  """Connects this process to the others that work on the same folder.

  A part that `--shard` names is made alone. Without a model there is nothing to share.

  Raises:
    ValueError: there are other processes in spite of `--shard`, or they cannot be joined.
  """
  from uae_jax.training import processes

  flags = (arguments.coordinator, arguments.num_processes, arguments.process_id)
  is_connected = any(flag is not None for flag in flags)
  if arguments.shard != (0, 1):
    if is_connected:
      raise ValueError("--shard is for processes that are not connected: leave it out, or leave out --coordinator")
  elif arguments.model or is_connected:
    processes.join(*flags)


def print_failures(failed: dict[str, str]) -> None:
  for name, why in failed.items():
    print(f"uae-jax evaluate: error: {name}: {why}", file=sys.stderr)


def generate(
  arguments: argparse.Namespace, suite, prompts, out: Path, known: dict | None
) -> tuple[dict, dict[str, str], int, bool]:
  """Makes the missing images; several processes share them.

  Args:
    arguments: the command line.
    suite: the benchmark.
    prompts: its prompts.
    out: output folder.
    known: result of an earlier call in this folder, or None.

  Returns:
    (settings, file -> error, number of whole files, whether any file was made).
  """
  from uae_jax.evaluation import generation, results
  from uae_jax.evaluation.suites.spec import SuiteError
  from uae_jax.training import processes

  samples = arguments.samples or suite.num_samples
  suite.targets(prompts[0], samples)  # Refuses an impossible number of samples before the model is loaded.
  uae = model_arguments.load(arguments)
  given = vars(arguments)
  settings = evaluation_settings.common(given, suite.name, prompts, uae.fingerprint())
  settings |= evaluation_settings.images(given, uae)
  settings["samples"] = samples
  height, width = settings["height"], settings["width"]
  if suite.is_square and height != width:
    raise SuiteError(f"{height} x {width} px: the scorer of {suite.name} needs square images")
  if known and (changed := results.differences(known["settings"], settings)):
    raise ValueError(f"{out} has images of other settings ({'; '.join(changed)}): choose another --out")
  if known is None:
    targets = [target.file for prompt in prompts for target in suite.targets(prompt, samples)]
    processes.on_first(lambda: outputs.require_own(out, "--out", results.FILE, targets))
    processes.on_first(lambda: results.write(out, settings, {"files": 0, "failed": {}}, None, suite.scale))
  part, parts = arguments.shard
  size = (height, width)
  # Process 0 says what is missing, because the others may see files that were written since.
  missing = processes.value_of_first(
    lambda: [job.target.file for job in generation.missing(suite, prompts[part::parts], samples, out, size)]
  )
  jobs = generation.jobs_of(suite, prompts, samples, set(missing))
  failed = generation.run(
    suite,
    processes.share(jobs),
    lambda texts, latents: uae.generate(
      list(texts),
      settings["steps"],
      settings["guidance"],
      height,
      width,
      latents=latents,
      batch_size=arguments.batch_size,
      guidance_interval=settings["guidance_interval"],
    ),
    out,
    seed=arguments.seed,
    latents_shape=uae.latents_shape(height, width),
    batch_size=arguments.batch_size or model_arguments.WINDOW,
  )
  failed = processes.merge(failed)
  left = processes.value_of_first(lambda: len(generation.missing(suite, prompts, samples, out, size)))
  total = sum(len(suite.targets(prompt, samples)) for prompt in prompts)
  return settings, failed, total - left, bool(jobs)


def take_settings(arguments: argparse.Namespace, file: Path) -> None:
  """Sets the options that the command line leaves open to those of a result.

  Raises:
    ValueError: the file is not a result.
  """
  from uae_jax.evaluation import results

  known = results.read(file)
  if known is None:
    raise ValueError(f"--like {file}: no such file")
  settings = known["settings"]
  arguments.suite = arguments.suite or settings["suite"]
  arguments.limit = arguments.limit or settings.get("num_prompts")
  for name in evaluation_settings.REPEATED:
    if getattr(arguments, name) is None and name in settings:
      setattr(arguments, name, settings[name])
  if (dtype := settings.get("dtype", evaluation_settings.AUTO)) != evaluation_settings.AUTO:
    arguments.dtype = arguments.dtype or dtype
  arguments.int8 = arguments.int8 or settings.get("int8", False)


def table(suite, scores, settings: dict) -> str:
  """The table of a suite beside the published overall scores, and the settings that move them."""

  first = suite.metric if isinstance(suite, Task) else ""
  blocks = {first: scores, **scores.metrics}
  width = max(len(name) for block in blocks.values() for name in (*block.categories, "overall", *suite.published))
  digits = 2 if suite.scale > 1 else 4
  lines: list[str] = []
  for title, block in blocks.items():
    lines += [*([""] if lines else []), title] if title else []
    for name, value in {**block.categories, "overall": block.overall}.items():
      low, high = block.intervals.get(name, (None, None))
      interval = "" if low is None else f"  [{suite.scale * low:.{digits}f}, {suite.scale * high:.{digits}f}]"
      lines.append(f"{name:{width}}  {suite.scale * value:.{digits}f}{interval}")
  lines += [f"{name:{width}}  {value} (published)" for name, value in suite.published.items()]
  shown = [name for name in evaluation_settings.SHOWN if name in settings]
  lines += ["", "settings: " + ", ".join(f"{name} {settings[name]}" for name in shown)]
  return "\n".join([*lines, *(f"note: {note}" for note in scores.notes)])
