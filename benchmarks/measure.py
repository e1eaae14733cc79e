"""Measures a suite: the backends given together alternate, so that other load on the machine affects all equally."""

from collections.abc import Callable, Iterator

from benchmarks.processes import Backend, BackendError, Clock
from benchmarks.timing import summary


def measure(
  backends: list[Backend], repeats: int, clock: Clock, is_done: Callable[[str, Backend], bool] = lambda *_: False
) -> Iterator[dict]:
  """Yields one row of results per case and backend, as soon as the case is measured.

  Args:
    backends: processes of one suite.
    repeats: timed runs per case, after two untimed runs.
    clock: limits of time.
    is_done: (case, backend) -> whether the case is skipped; the case of a suite that cannot be opened is "".

  Raises:
    OutOfTime: the run has no time left; the case that was running has no rows.
  """
  started = {}
  for backend in backends:
    clock.start_case()
    try:
      started[backend] = backend.open(clock)
    except BackendError as error:
      yield _row(backend, "") | {"error": str(error)}
  for case in dict.fromkeys(case for cases in started.values() for case in cases):
    wanted = [backend for backend, cases in started.items() if case in cases and not is_done(case, backend)]
    if wanted:
      clock.start_case()
      yield from _case(case, wanted, repeats, clock)


def _row(backend: Backend, case: str) -> dict:
  return {
    "suite": backend.suite,
    "size": backend.size,
    "case": case,
    "backend": backend.name,
    "about": backend.about,
  }


def _case(case: str, backends: list[Backend], repeats: int, clock: Clock) -> list[dict]:
  rows, ready = [], {}

  def ask(backend, row, command):
    try:
      if not backend.is_alive:  # It ended in the case before.
        backend.open(clock)
      return backend.ask(command, clock, case)
    except BackendError as error:
      row["error"] = str(error)
      ready.pop(backend, None)

  for backend in backends:
    row = _row(backend, case)
    rows.append(row)
    if prepared := ask(backend, row, "prepare"):
      ready[backend] = (row, [prepared.pop("sample")] if prepared.pop("is_once") else [])
      row |= prepared
  measured_once = {backend for backend, (_, samples) in ready.items() if samples}
  for _ in range(repeats):
    for backend, (row, samples) in list(ready.items()):
      if backend not in measured_once and (sample := ask(backend, row, "run")):
        samples.append(sample["sample"])
  for backend, (row, samples) in list(ready.items()):
    row |= summary(samples)
    row["rate"] = row["amount"] / row["seconds"]
    row["samples"] = samples
    ask(backend, {}, "drop")
  return rows
