"""`uae-jax sweep`: trains a config at many points, here or through a launcher, and compares the results."""

import argparse
from collections.abc import Sequence
import fnmatch
import hashlib
import json
from pathlib import Path
import re
import shlex
import subprocess
import sys

from uae_jax import outputs
from uae_jax.commands import config_file
from uae_jax.commands.command_line import Parser, number, path
from uae_jax.commands.model_arguments import positive
from uae_jax.options.flags import split_flags

EPILOG = (
  "Points are those of the config's sweep(add), or of --grid and --draw; flags such as --config.seed=1 apply to every "
  "run. The same command continues: finished runs are not run again. The results are in DIR/index.html and "
  "DIR/sweep.json, each run in DIR/<point>. The exit code is 0 if every run that should finish has finished."
)


def parser() -> Parser:
  parser = Parser("sweep", "Trains a config at many points and compares the results on one page.", EPILOG)
  add = parser.add_argument
  add("--config", required=True, metavar="FILE[:VARIANT]", help="experiment, such as configs/scenes.py")
  add("--workdir", required=True, type=path, metavar="DIR", help="folder of the sweep; each run has a workdir in it")
  add("--name", help="name of the sweep, on its page and in job names; default: that of DIR")
  add("--grid", action="append", default=[], metavar="config.FIELD=A,B,...", help="all combinations of these values")
  add(
    "--draw",
    action="append",
    default=[],
    metavar="config.FIELD=DIST",
    help="random values: uniform(LOW,HIGH), loguniform(LOW,HIGH), integer(LOW,HIGH), choice(A,B,...)",
  )
  add("--num", type=positive, default=8, help="number of random points; default %(default)s")
  add("--seed", type=number(int, at_least=0), default=0, help="seed of the random points; default %(default)s")
  add("--config-points", action="store_true", help="combine --grid and --draw with the points of sweep(add)")
  add("--only", metavar="PATTERN", help="only the points whose name matches, such as 'gspo*'")
  add("--parallel", type=positive, default=1, metavar="N", help="runs at a time, which share cores or GPUs")
  add("--retry-failed", action="store_true", help="run those again that have failed")
  add("--metric", default="reward_similarity", help="metric that says which run is best; default %(default)s")
  add("--goal", choices=("max", "min"), default="max", help="whether more is better; default %(default)s")
  add("--columns", default="", metavar="NAME,...", help="further metrics of the table")
  add(
    "--halving",
    default="",
    metavar="FRACTION,...",
    help="stop runs at these fractions of the last stage's steps, such as 0.25,0.5; the best go on",
  )
  add("--keep", type=number(float), default=0.5, metavar="SHARE", help="share of runs that go on; default %(default)s")
  add("--halving-metric", metavar="NAME", help="logged metric that decides; default: that of --metric")
  add(
    "--launcher",
    metavar="COMMAND",
    help="print a command per run instead; {name}, {workdir}, {config} and {flags} "
    "in it stand for the job's name, and for the arguments of uae-jax train",
  )
  add("--submit", action="store_true", help="with --launcher: run these commands instead of printing them")
  add("--list", action="store_true", help="print the runs and their states; run nothing")
  return parser


def main(argv: list[str]) -> int:
  """Parses the arguments, runs or submits what is not finished, and writes the results."""
  overrides, rest = split_flags(argv)
  commands = parser()
  arguments = commands.parse_args(rest)
  fractions = fractions_of(arguments)
  if not arguments.draw:
    commands.refuse_unused(arguments, ["num", "seed"], "goes with --draw")
  if not fractions:
    commands.refuse_unused(arguments, ["keep", "halving_metric"], "goes with --halving")
  if arguments.launcher:
    commands.refuse_unused(arguments, ["list", "parallel", "halving"], "does not go with --launcher")
  refuse_run(arguments.workdir)
  if arguments.submit and not arguments.launcher:
    raise argparse.ArgumentError(None, "--submit needs --launcher=COMMAND")

  from uae_jax.sweeps import halving, results, runner

  sweep = make_sweep(arguments, overrides)
  sweep.folder.mkdir(parents=True, exist_ok=True)
  name = arguments.name or sweep.folder.resolve().name
  wanted = list(sweep.points)
  try:
    if arguments.launcher:
      launch(sweep, name, arguments.launcher, arguments.submit, arguments.retry_failed)
    elif not arguments.list:
      options = {"parallel": arguments.parallel, "retry_failed": arguments.retry_failed, "log": log}
      if fractions:
        metric = arguments.halving_metric or arguments.metric
        wanted = halving.halve(sweep, fractions, arguments.keep, metric, arguments.goal == "max", **options)
      runner.run_all(sweep, wanted, **options)
  finally:
    rows = [results.read_row(sweep, point) for point in sweep.points]
    write_results(sweep, name, rows, arguments)
  if arguments.launcher:
    return 0
  unfinished = [row for row in rows if row.point in wanted and row.state != "finished"]
  return 1 if unfinished and not arguments.list else 0


def fractions_of(arguments: argparse.Namespace) -> list[float]:
  """The fractions of --halving.

  Raises:
    argparse.ArgumentError: they are not increasing numbers between 0 and 1, or --keep is no share.
  """
  try:
    fractions = [float(text) for text in arguments.halving.split(",") if text]
  except ValueError:
    fractions = [2.0]
  if fractions != sorted(set(fractions)) or not all(0 < fraction < 1 for fraction in fractions):
    raise argparse.ArgumentError(None, f"--halving={arguments.halving}: expected increasing fractions such as 0.25,0.5")
  if not 0 < arguments.keep < 1:
    raise argparse.ArgumentError(None, f"--keep={arguments.keep:g}: expected a share between 0 and 1")
  return fractions


def make_sweep(arguments: argparse.Namespace, overrides: Sequence[tuple[str, str]]):
  """The sweep, with the config of every point checked; returns a `sweeps.runner.Sweep`.

  Raises:
    argparse.ArgumentError: a field or value is wrong; the message names the point.
    ValueError: there is no point, or a workdir holds a run with another config.
  """
  from uae_jax.options import read_config
  from uae_jax.options.flags import override
  from uae_jax.sweeps import points
  from uae_jax.sweeps.runner import Sweep

  module = config_file.load_module(arguments.config)
  by_flags = arguments.grid or arguments.draw
  bases: list[tuple[str, points.Overrides]] = [("", ())]
  if not by_flags or arguments.config_points:
    if not hasattr(module, "sweep"):
      raise ValueError(f"--config={arguments.config}: the file defines no sweep(add); give --grid or --draw")
    bases = points.from_config(module.sweep)
  grid, draws = points.grid(arguments.grid), points.draws(arguments.draw, arguments.num, arguments.seed)
  if both := [field for field, _ in grid[0] if field in dict(draws[0])]:
    raise argparse.ArgumentError(None, f"--grid and --draw both give {both[0]}: remove one of them")
  found = points.combine(bases, grid, draws)
  if arguments.only:
    found = [point for point in found if fnmatch.fnmatchcase(point.name, arguments.only)]
  if not found:
    raise ValueError("the sweep has no point" + (f" that matches --only={arguments.only}" if arguments.only else ""))
  for field in dict(overrides):
    if any(field in dict(point.overrides) for point in found):
      raise argparse.ArgumentError(None, f"--config.{field} is set by the points of the sweep: remove the flag")
  folder, experiments = arguments.workdir, {}
  for point in found:
    config = config_file.load_config(arguments.config)
    try:
      for field, text in [*overrides, *((f, points.insert(t, dict(point.overrides))) for f, t in point.overrides)]:
        override(config, field, text)
      experiments[point.name] = read_config(config)
    except ValueError as error:
      raise argparse.ArgumentError(None, f"{point.name}: {error}") from error
    refuse_another(folder / point.name, experiments[point.name])
  common = tuple(f"--config.{field}={text}" for field, text in overrides)
  return Sweep(folder, arguments.config, common, tuple(found), experiments)


def refuse_run(folder: Path) -> None:
  """Refuses a folder that is a run itself, or in which nothing can be written.

  Raises:
    ValueError: it is.
  """
  if (folder / "config.json").exists():
    raise ValueError(f"--workdir={folder} is a run: a sweep needs a folder of its own, with a workdir for each run")
  outputs.require_folder(folder, "--workdir")


def refuse_another(workdir: Path, config) -> None:
  """Refuses a workdir that holds a run of another config; `config` is an `Experiment`.

  More is refused than when a run is resumed: a finished run would be taken for one with the new config.

  Raises:
    ValueError: it does.
  """
  from uae_jax.training.workdir import CONFIG_FILE, INERT_FIELDS, differences, is_any, read_config, to_plain

  if not (workdir / CONFIG_FILE).exists():
    return
  found = differences(read_config(workdir), to_plain(config))
  changed = [
    f"config.{field}: {old!r} -> {new!r}" for field, (old, new) in found.items() if not is_any(field, INERT_FIELDS)
  ]
  if changed:
    raise ValueError(
      f"{workdir} holds a run with another config ({'; '.join(changed[:5])}): "
      "use the old values to go on, or another --workdir"
    )


def launch(sweep, name: str, template: str, submits: bool, retry_failed: bool) -> None:
  """Prints or runs a command per run that is not finished and was not submitted before.

  Raises:
    ValueError: the template has no place for the run, or a command failed.
  """
  from uae_jax.files import write_whole

  words = shlex.split(template)
  if "{flags}" not in words and "{workdir}" not in template:
    raise ValueError("--launcher: put {flags} in the command, which stands for the arguments of uae-jax train")
  file = sweep.folder / "submitted.json"
  submitted = read_submitted(file)
  for point in sweep.points:
    if sweep.state(point) == "finished" or (point.name in submitted and not retry_failed):
      log(f"{point.name}: {'finished' if sweep.state(point) == 'finished' else 'submitted before'}")
      continue
    values = {"name": job_name(name, point.name), "workdir": str(sweep.workdir(point)), "config": sweep.config}
    command = []
    for word in words:
      if word == "{flags}":
        command += sweep.arguments(point)
      else:
        command.append(re.sub(r"\{(name|workdir|config)\}", lambda match: values[match[1]], word))  # noqa: B023
    if not submits:
      print(shlex.join(command))
      continue
    log(f"{point.name}: {shlex.join(command)}")
    code = subprocess.run(command, check=False).returncode
    if code:
      raise ValueError(f"{point.name}: the launcher ended with exit code {code}; the same command continues")
    submitted = list(dict.fromkeys([*submitted, point.name]))
    write_whole(file, json.dumps(submitted) + "\n")


def read_submitted(file: Path) -> list[str]:
  """Reads the names of the runs that a launcher has; none if there is no file.

  Raises:
    ValueError: the file is no list of names, so runs could be started twice.
  """
  try:
    names = json.loads(file.read_text()) if file.exists() else []
  except (ValueError, RecursionError):
    names = None
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
    raise ValueError(f"{file}: not a list of submitted runs: mend it, or delete it if none of them was submitted")
  return names


def job_name(sweep: str, point: str) -> str:
  """A job's name for any engine: at most 40 of a-z, 0-9 and -, as XPK wants; from a letter to a letter or digit."""
  clean = re.sub(r"[^a-z0-9]+", "-", f"{sweep}-{point}".lower()).strip("-")
  clean = clean if clean[:1].isalpha() else f"s-{clean}"
  return f"{clean[:33].rstrip('-')}-{hashlib.sha256(f'{sweep}/{point}'.encode()).hexdigest()[:6]}"


def write_results(sweep, name: str, rows: list, arguments: argparse.Namespace) -> None:
  """Writes the page and `sweep.json`, and prints the table and the best run."""
  from uae_jax.sweeps import page, results

  is_max = arguments.goal == "max"
  rows = results.rank(rows, arguments.metric, is_max)
  metrics = results.columns(rows, arguments.metric, [name for name in arguments.columns.split(",") if name])
  results.write_json(sweep.folder / "sweep.json", sweep, rows, arguments.metric, arguments.goal)
  file = page.write_page(sweep, name, rows, arguments.metric, arguments.goal, metrics)
  out = sys.stderr if arguments.launcher else sys.stdout
  print(results.table(rows, metrics), file=out)
  winner = results.best(rows, arguments.metric, is_max)
  if winner is not None:
    print(f"best {arguments.metric}: {winner.point.name}\n{results.command(sweep, winner.point)}", file=out)
  print(f"page: {file}", file=out)


def log(line: str) -> None:
  print(f"sweep: {line}", file=sys.stderr, flush=True)
