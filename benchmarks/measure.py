"""Measures a suite: backends alternate, so that other load on the machine affects all of them equally."""

import contextlib
from pathlib import Path

from benchmarks.processes import Backend, BackendError
from benchmarks.timing import summary


def measure(suite: str, backends: list[str], size: str, folder: Path, repeats: int, threads: int, log) -> list[dict]:
  """Measures a suite; returns one row of results per case and backend.

  Args:
    suite: one of `SUITES`.
    backends: some of `BACKENDS`.
    size: a key of `SIZES`.
    folder: contains the shared weights.
    repeats: timed runs per case, after two untimed runs.
    threads: CPU cores per process.
    log: open file that receives the output of the processes.
  """
  rows = []
  with contextlib.ExitStack() as stack:
    started = {}
    # All processes start at once, so that their imports overlap.
    for backend in [stack.enter_context(Backend(suite, name, size, folder, threads, log)) for name in backends]:
      try:
        started[backend] = backend.cases()
      except BackendError as error:
        rows.append({"suite": suite, "case": "", "backend": backend.name, "error": str(error)})
    for case in dict.fromkeys(case for cases in started.values() for case in cases):
      rows += _case(suite, case, [backend for backend, cases in started.items() if case in cases], repeats)
  return rows


def _case(suite: str, case: str, backends: list[Backend], repeats: int) -> list[dict]:
  rows, ready = [], {}

  def ask(backend, row, command):
    try:
      return backend.ask(command, case)
    except BackendError as error:
      row["error"] = str(error)
      ready.pop(backend, None)

  for backend in backends:
    row = {"suite": suite, "case": case, "backend": backend.name}
    rows.append(row)
    ready[backend] = (row, [])
    row |= ask(backend, row, "prepare") or {}
  for _ in range(repeats):
    for backend, (row, samples) in list(ready.items()):
      if sample := ask(backend, row, "run"):
        samples.append((sample["seconds"], sample["processor_seconds"]))
  for backend, (row, samples) in list(ready.items()):
    row |= summary(samples)
    row["rate"] = row["amount"] / row["seconds"]
    row["samples"] = samples
    ask(backend, row, "drop")
  return rows
