"""Runs one suite of one backend in its own process: reads commands from stdin and answers each with a JSON line.

The libraries are imported at once; the device is first used by the command `open`.

python -m benchmarks.worker --suite rollout --backend torch --size small --folder DIR --threads 2
"""

import argparse
import contextlib
import ctypes
import gc
import importlib
import json
import os
from pathlib import Path
import sys
import traceback

from benchmarks.sizes import MKL_NATIVE, SIZES, Size
from benchmarks.suites import OWN


def restrict(threads: int) -> None:
  """Restricts this process to its first `threads` cores; call before any library creates a thread pool."""
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
  os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)


def import_suite(suite: str, backend: str):
  """Imports the module of a suite, without using a device."""
  if backend.removesuffix(MKL_NATIVE) not in ("uae_jax", "torch", "torch_compiled"):
    raise ValueError(f"backend {backend!r} is not known")
  return importlib.import_module(f"benchmarks.{'suites' if backend == 'uae_jax' else 'torch_peers'}.{suite}")


def open_suite(suite: str, backend: str, size_name: str, folder: Path, threads: int) -> tuple[dict, dict]:
  """Opens a suite; returns (name -> function that makes the case, facts about device and libraries)."""
  size, module = SIZES[size_name], import_suite(suite, backend)
  if backend == "uae_jax":
    import jax

    from benchmarks import world

    check_device(size, jax.default_backend())
    made = world.make(size, is_unrolled=suite not in OWN, needs=getattr(module, "NEEDS", ("",)))
    return module.cases(made), about_jax()
  import torch

  from benchmarks.torch_peers.nets import Nets

  torch.set_num_threads(threads)
  nets = Nets(size, folder, is_compiled=backend.startswith("torch_compiled"))
  check_device(size, nets.device.type)
  return module.cases(nets), about_torch(nets)


def check_device(size: Size, platform: str) -> None:
  """Refuses networks on a CPU that would take hours there.

  Raises:
    ValueError: the networks have their full size, and the platform is a CPU.
  """
  if size.networks == "full" and platform == "cpu":
    raise ValueError("found no accelerator for networks of full size; --shapes small checks the harness on a CPU")


def about_jax() -> dict[str, str]:
  """Versions, device and flags of this process."""
  import jax
  import jaxlib

  return {
    "device": jax.devices()[0].device_kind,
    "jax": f"{jax.__version__}, jaxlib {jaxlib.__version__}",
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
  }


def about_torch(nets) -> dict[str, str]:
  """Versions, device and libraries of this process."""
  import torch
  import transformers

  is_cuda = nets.device.type == "cuda"
  return {
    "device": torch.cuda.get_device_name() if is_cuda else "cpu",
    "torch": f"{torch.__version__}, transformers {transformers.__version__}",
    "libraries": ", ".join(nets.libraries) or "own modules for diffusers and PEFT",
    "preloaded": os.environ.get("LD_PRELOAD", ""),
  }


class Worker:
  """Executes the commands `open`, `prepare`, `run` and `drop`."""

  def __init__(self, arguments):
    self._arguments, self._cases = arguments, {}
    self._backend = arguments.backend
    self._is_comparable = SIZES[arguments.size].shares_weights
    self._ready = {}

  def open(self) -> dict:
    """Opens the suite; returns the names of its cases, and facts about device and libraries."""
    given = self._arguments
    self._cases, about = open_suite(given.suite, given.backend, given.size, given.folder, given.threads)
    return {"cases": list(self._cases), "about": about}

  def prepare(self, name: str) -> dict:
    """Makes the case and runs it twice; the first run's extra time counts as compile time.

    The time of the first run is also the sample of a case that runs only once.
    """
    from benchmarks.timing import Memory, timed

    case = self._cases[name]()
    memory = Memory(self._backend)
    before = memory.start()
    first, processor = timed(case.run)
    second = first if case.is_once else timed(case.run)[0]
    peak = memory.peak()
    self._ready[name] = case
    return {
      "unit": case.unit,
      "amount": case.amount,
      "flops": case.flops,
      "bytes": case.bytes,
      "facts": case.facts,
      "seconds_first_run": first,
      "is_once": case.is_once,
      "sample": (first, processor),
      "seconds_compile": max(first - second, 0.0) if case.seconds_compile is None else case.seconds_compile,
      "memory_before_mb": before,
      "memory_peak_mb": peak,
      # Check values are comparable only with equal weights.
      "check": list(map(float, case.check())) if case.check and self._is_comparable else None,
    }

  def run(self, name: str) -> dict:
    from benchmarks.timing import timed

    wall, processor = timed(self._ready[name].run)
    return {"sample": (wall, processor)}

  def drop(self, name: str) -> dict:
    """Deletes the case and frees its memory, so that the peak of the next case does not include it."""
    del self._ready[name]
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    if self._backend != "uae_jax":
      import torch

      if torch.cuda.is_available():
        torch.cuda.empty_cache()
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
  worker = Worker(arguments)
  with contextlib.suppress(Exception):  # `open` imports it again and reports the error.
    import_suite(arguments.suite, arguments.backend)
  for line in sys.stdin:
    command, *values = json.loads(line)
    answer(getattr(worker, command), *values)


if __name__ == "__main__":
  main()
