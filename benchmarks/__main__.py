"""Measures speed, distance from the hardware's limit, and PyTorch baselines.

python -m benchmarks --out bench                                                     every suite, CPU sizes
python -m benchmarks --suites rollout,sampling --size small --out bench              takes seconds; checks the harness
python -m benchmarks --preset h200 --out bench                                       full-size networks on one GPU
"""

import argparse
import datetime
import json
import os
from pathlib import Path
import platform
import subprocess
import sys
import tempfile
import time

from benchmarks.measure import measure
from benchmarks.plot import chart
from benchmarks.sizes import SIZES
from benchmarks.suites import OWN
from benchmarks.table import table

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
  parser.add_argument("--suites", default=",".join(SUITES))
  parser.add_argument("--backends", default=",".join(BACKENDS))
  parser.add_argument("--size", "--preset", default="medium", choices=SIZES)
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
  parser.add_argument("--out", type=Path, required=True)
  arguments = parser.parse_args(argv)
  try:
    arguments.suites = names(arguments.suites, SUITES, "--suites")
    arguments.backends = names(arguments.backends, BACKENDS, "--backends")
  except ValueError as error:
    parser.error(str(error))
  if not 1 <= arguments.threads <= len(os.sched_getaffinity(0)):
    parser.error(f"--threads {arguments.threads}: this process may use {len(os.sched_getaffinity(0))} cores")
  return arguments


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


def export(size: str, folder: Path) -> None:
  """Writes the shared weights in a separate process."""
  subprocess.run([sys.executable, "-m", "benchmarks.world", size, str(folder)], check=True)


def main(argv: list[str]) -> int:
  arguments = parse(argv)
  arguments.out.mkdir(parents=True, exist_ok=True)
  # The processes of a suite share the GPU.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  about, rows = machine(arguments.threads), []
  with tempfile.TemporaryDirectory() as folder, open(arguments.out / "log.txt", "w") as log:
    export(arguments.size, Path(folder))
    for suite in arguments.suites:
      backends = [name for name in arguments.backends if name == "uae_jax" or suite not in OWN]
      start, load = time.perf_counter(), os.getloadavg()[0]
      repeats = min(arguments.repeats, OWN_REPEATS) if suite in OWN else arguments.repeats
      found = measure(suite, backends, arguments.size, Path(folder), repeats, arguments.threads, log)
      print(f"{suite}: {time.perf_counter() - start:.0f} s, load {load:.1f} before", file=sys.stderr)
      for row in found:
        row["load"] = load
      rows += found
      # Written after each suite, so that an interrupted run keeps its results.
      text = table(rows)
      (arguments.out / "results.json").write_text(json.dumps({"machine": about, "rows": rows}, indent=1))
      (arguments.out / "results.md").write_text(text)
      (arguments.out / "results.svg").write_text(chart(rows))
  print(text)
  return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
