"""Measures speed, distance from the hardware's limit, and PyTorch baselines.

python -m benchmarks --out bench                                                     every suite, CPU sizes
python -m benchmarks --suites rollout,sampling --size small --out bench              takes seconds; checks the harness
python -m benchmarks --preset gpu --minutes 8 --out bench                            full-size networks on one GPU
python -m benchmarks --preset gpu --shapes small --out bench                         checks that preset on a CPU

A run goes on where the last one with the same --out stopped.
"""

import argparse
from collections.abc import Iterator
import contextlib
import dataclasses
import datetime
import os
from pathlib import Path
import platform
import subprocess
import sys
import tempfile
import time

from benchmarks import pieces
from benchmarks.measure import measure
from benchmarks.native import mkl
from benchmarks.processes import XLA_GPU_FLAGS, Backend, Clock, OutOfTime, Settings
from benchmarks.results import Results
from benchmarks.sizes import MKL_NATIVE
from benchmarks.suites import OWN

# The roof suite runs first: all fractions refer to it.
SUITES = (
  "roof",
  "rollout",
  "sampling",
  "token_grpo",
  "flow_grpo",
  "stage2",
  "stage3",
  "embedders",
  "vae",
  "input",
  "checkpoint",
  "prefix",
  "scaling",
  "devices",
)
OWN_REPEATS = 3
BACKENDS = ("uae_jax", "torch", "torch_compiled")
UNFINISHED = 3  # exit status: the time ended before the work


@dataclasses.dataclass(frozen=True)
class Work:
  """A suite with a size of networks, and the groups of backends that alternate: one group, or one per backend."""

  suite: str
  size: str
  groups: tuple[tuple[str, ...], ...]


def names(text: str, known: tuple[str, ...], flag: str) -> list[str]:
  """Parses a comma-separated choice; returns it in the order of `known`.

  Raises:
    ValueError: a name is unknown.
  """
  chosen = text.split(",")
  for name in chosen:
    if name not in known:
      raise ValueError(f"{flag}: {name!r} is not known; expected some of {', '.join(known)}")
  return [name for name in known if name in chosen]


def parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", type=Path, required=True, help="folder of results, and where a run goes on")
  parser.add_argument("--backends", help=f"some of {','.join(BACKENDS)}")
  parser.add_argument("--repeats", type=int, help="timed runs per case (5; 3 with a preset)")
  parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
  parser.add_argument(
    "--minutes", type=float, help="stop before the case that would not end in this time, with status 3"
  )
  parser.add_argument("--case-minutes", type=float, default=7.0, help="a case that takes longer has failed")
  parser.add_argument("--retry", action="store_true", help="run the cases again that failed")
  cpu = parser.add_argument_group("suites on a CPU")
  cpu.add_argument("--suites", default=",".join(SUITES))
  cpu.add_argument("--size", default="medium", choices=("small", "medium"))
  cpu.add_argument(
    "--torch-mkl", default="default", choices=("default", "native", "both"), help="native: MKL's best kernels"
  )
  accelerator = parser.add_argument_group("pieces on an accelerator")
  accelerator.add_argument("--preset", choices=pieces.PRESETS)
  accelerator.add_argument("--piece", default="all", help="names or numbers of pieces")
  accelerator.add_argument("--shapes", default="full", choices=("full", "small"), help="small checks the harness")
  accelerator.add_argument("--xla-flags", help=f"instead of {XLA_GPU_FLAGS} with --preset gpu")
  accelerator.add_argument("--learning-start", type=Path, help="weights of the piece learning (benchmarks.learning)")
  arguments = parser.parse_args(argv)
  try:
    arguments.work = planned(arguments)
  except ValueError as error:
    parser.error(str(error))
  if not 1 <= arguments.threads <= len(os.sched_getaffinity(0)):
    parser.error(f"--threads {arguments.threads}: this process may use {len(os.sched_getaffinity(0))} cores")
  if arguments.learning_start is not None and not arguments.learning_start.is_file():
    parser.error(f"--learning-start {arguments.learning_start}: no such file")
  return arguments


def planned(arguments: argparse.Namespace) -> list[Work]:
  """All work of a run, in order.

  Raises:
    ValueError: an argument names something unknown.
  """
  if arguments.preset is None:
    suites = names(arguments.suites, SUITES, "--suites")
    chosen = names(arguments.backends or ",".join(BACKENDS), BACKENDS, "--backends")
    chosen = with_mkl(chosen, arguments.torch_mkl)
    return [
      Work(suite, arguments.size, (tuple(name for name in chosen if name == "uae_jax" or suite not in OWN),))
      for suite in suites
    ]
  known = pieces.BACKENDS[arguments.preset]
  chosen = names(arguments.backends or ",".join(known), known, "--backends")
  sizes = pieces.PRESETS[arguments.preset][arguments.shapes]
  return [
    Work(suite, sizes[piece.has_large], tuple((name,) for name in chosen if name == "uae_jax" or suite not in OWN))
    for piece in pieces.choose(arguments.piece)
    for suite in piece.suites
  ]


def with_mkl(backends: list[str], mode: str) -> list[str]:
  """The backends with MKL as it is, with its best kernels, or with both."""
  if mode != "default":
    mkl.library()  # An absent compiler is reported before anything runs.
  ours, theirs = ([b for b in backends if (b == "uae_jax") == is_ours] for is_ours in (True, False))
  native = [f"{name}{MKL_NATIVE}" for name in theirs]
  return ours + {"default": theirs, "native": native, "both": theirs + native}[mode]


def machine(threads: int) -> dict:
  """Describes the machine: processor, threads, load, date and Python version."""
  lines = Path("/proc/cpuinfo").read_text().splitlines()
  model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
  return {
    "processor": model,
    "threads": threads,
    "load_at_start": os.getloadavg()[0],
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "python": platform.python_version(),
  }


def export(sizes: list[str], folder: Path) -> None:
  """Writes the shared weights in a separate process, which leaves an accelerator alone."""
  command = [sys.executable, "-m", "benchmarks.world", str(folder), *sizes]
  subprocess.run(command, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def run(arguments: argparse.Namespace, results: Results, settings: Settings, clock: Clock, log) -> None:
  """Does the work that has no results yet, and writes each result as it comes.

  Raises:
    OutOfTime: the time ended before the work.
  """
  repeats = arguments.repeats or (3 if arguments.preset else 5)
  groups = [
    (work, tuple(name for name in group if not results.is_finished(work.suite, work.size, name)))
    for work in arguments.work
    for group in work.groups
  ]
  groups = [(work, group) for work, group in groups if group]
  export(list(dict.fromkeys(work.size for work, _ in groups)), settings.folder)
  with contextlib.ExitStack() as stack:
    processes = started(groups, settings, log, stack)
    # On an accelerator the next group imports its libraries while this one measures.
    for work, backends, own in processes if arguments.preset is None else one_ahead(processes):
      begun, load = time.perf_counter(), os.getloadavg()[0]
      times = min(repeats, OWN_REPEATS) if work.suite in OWN else repeats

      def is_done(case, backend):
        return results.has(backend.suite, backend.size, case, backend.name)

      for row in measure(backends, times, clock, is_done):
        results.add(row | {"load": load})
      own.close()
      group = [backend.name for backend in backends]
      results.finish(work.suite, work.size, group)
      seconds = time.perf_counter() - begun
      print(f"{work.suite} {work.size} {','.join(group)}: {seconds:.0f} s, load {load:.1f} before", file=sys.stderr)


def started(groups: list, settings: Settings, log, stack: contextlib.ExitStack) -> Iterator[tuple]:
  """Starts the processes of one group after the other; yields (work, backends, the stack that ends them)."""
  for work, group in groups:
    own = stack.enter_context(contextlib.ExitStack())
    yield work, [own.enter_context(Backend(work.suite, name, work.size, settings, log)) for name in group], own


def one_ahead(items: Iterator) -> Iterator:
  """Yields the items of an iterator, each after the next one has been made."""
  ahead = None
  for item in items:
    if ahead is not None:
      yield ahead
    ahead = item
  if ahead is not None:
    yield ahead


def main(argv: list[str]) -> int:
  arguments = parse(argv)
  clock = Clock(None if arguments.minutes is None else 60 * arguments.minutes, 60 * arguments.case_minutes)
  results = Results(arguments.out, retries=arguments.retry)
  results.add({"machine": machine(arguments.threads)})
  flags = arguments.xla_flags if arguments.xla_flags is not None else XLA_GPU_FLAGS if arguments.preset == "gpu" else ""
  with tempfile.TemporaryDirectory() as folder, open(arguments.out / "log.txt", "a") as log:
    start_file = arguments.learning_start and arguments.learning_start.absolute()
    settings = Settings(Path(folder), arguments.threads, flags, start_file)
    try:
      run(arguments, results, settings, clock, log)
    except OutOfTime:
      print(results.write_table())
      print("The time ended before the work: run the same command again.", file=sys.stderr)
      return UNFINISHED
  print(results.write_table())
  return 1 if any("error" in row for row in results.rows) else 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
