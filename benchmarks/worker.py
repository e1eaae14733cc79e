"""Runs one suite of one backend in its own process: reads commands from stdin and answers each with a JSON line.

python -m benchmarks.worker --suite rollout --backend torch --size small --folder DIR --threads 2
"""

import argparse
import ctypes
import gc
import importlib
import json
import os
from pathlib import Path
import sys
import traceback

from benchmarks.sizes import SIZES
from benchmarks.suites import OWN


def restrict(threads: int) -> None:
  """Restricts this process to its first `threads` cores; call before any library creates a thread pool."""
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
  os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)


def open_suite(suite: str, backend: str, size_name: str, folder: Path, threads: int) -> dict:
  """Opens a suite: name -> function that makes the case."""
  size = SIZES[size_name]
  if backend == "uae_jax":
    from benchmarks import world

    found = importlib.import_module(f"benchmarks.suites.{suite}")
    return found.cases(world.make(size, is_unrolled=suite not in OWN))
  if backend not in ("torch", "torch_compiled"):
    raise ValueError(f"backend {backend!r} is not known")
  import torch

  from benchmarks.torch_peers.nets import Nets

  torch.set_num_threads(threads)
  nets = Nets(size, folder, is_compiled=backend == "torch_compiled")
  return importlib.import_module(f"benchmarks.torch_peers.{suite}").cases(nets)


class Worker:
  """Executes the commands `prepare`, `run` and `drop`."""

  def __init__(self, arguments):
    self._cases = open_suite(arguments.suite, arguments.backend, arguments.size, arguments.folder, arguments.threads)
    self._backend = arguments.backend
    self._is_comparable = SIZES[arguments.size].shares_weights
    self._ready = {}

  def names(self) -> list[str]:
    return list(self._cases)

  def prepare(self, name: str) -> dict:
    """Makes the case and runs it twice; the first run's extra time counts as compile time."""
    from benchmarks.timing import Memory, timed

    case = self._cases[name]()
    memory = Memory(self._backend)
    before = memory.start()
    (first, _), (second, _) = timed(case.run), timed(case.run)
    peak = memory.peak()
    self._ready[name] = case
    return {
      "unit": case.unit,
      "amount": case.amount,
      "flops": case.flops,
      "bytes": case.bytes,
      "facts": case.facts,
      "seconds_first_run": first,
      "seconds_compile": max(first - second, 0.0) if case.seconds_compile is None else case.seconds_compile,
      "memory_before_mb": before,
      "memory_peak_mb": peak,
      # Check values are comparable only with equal weights.
      "check": list(map(float, case.check())) if case.check and self._is_comparable else None,
    }

  def run(self, name: str) -> dict:
    from benchmarks.timing import timed

    wall, processor = timed(self._ready[name].run)
    return {"seconds": wall, "processor_seconds": processor}

  def drop(self, name: str) -> dict:
    """Deletes the case and frees its memory, so that the peak of the next case does not include it."""
    del self._ready[name]
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return {}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--suite", required=True)
  parser.add_argument("--backend", required=True)
  parser.add_argument("--size", required=True)
  parser.add_argument("--folder", type=Path, required=True)
  parser.add_argument("--threads", type=int, required=True)
  arguments = parser.parse_args()
  # Libraries print to stdout, so answers use a duplicate of it, and stdout is redirected to stderr.
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)

  def answer(function, *values):
    try:
      result = function(*values)
    except Exception as error:  # Any failure of a backend is a result of the benchmark.
      traceback.print_exc()
      result = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]}
    print(json.dumps(result), file=answers, flush=True)

  restrict(arguments.threads)
  worker = None

  def start():
    nonlocal worker
    worker = Worker(arguments)
    return worker.names()

  answer(start)
  for line in sys.stdin:
    command, *values = json.loads(line)
    answer(getattr(worker, command), *values)


if __name__ == "__main__":
  main()
