"""A suite measured: backends take turns, so that what else the machine does hits all of them alike."""

import contextlib
from pathlib import Path

from benchmarks.processes import Backend, BackendError
from benchmarks.timing import summary


def measure(suite: str, backends: list[str], size: str, folder: Path, repeats: int, threads: int, log) -> list[dict]:
  """Rows of results, one a case and backend.

  Args:
    suite: of `SUITES`.
    backends: of `BACKENDS`.
    size: of `SIZES`.
    folder: with the shared weights.
    repeats: timed runs of each case, after two that are not.
    threads: cores of each process.
    log: open file for what the processes print.
  """
  rows = []
  with contextlib.ExitStack() as stack:
    started = {}
    # All start at once, and import while others do.
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
