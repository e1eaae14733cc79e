"""Ends a process whose steps have stopped, so that the engine that started it can start it again."""

import datetime
import faulthandler
import os
from pathlib import Path
import sys
import threading
import time

# No signal's code, and in the range (127 to 255) in which XPK starts a workload again.
EXIT_CODE = 175
# Everything that is not a step (loading, compiling, evaluation, saves) may take so many times as long as a step.
GRACE = 20


class Watchdog:
  """Context manager that ends the process with `EXIT_CODE` when its heartbeat stops.

  Before it does, it writes the stacks of all threads to stderr and to `<workdir>/hangs/`. Every process of a run has
  its own: a hang in a collective operation ends all of them.

  Args:
    seconds: longest time between the ends of two steps; 0 disables.
    workdir: folder of the run.
    process_index: index of this process, for the name of the file.
  """

  def __init__(self, seconds: float, workdir: Path = Path(), process_index: int = 0):
    self._seconds, self._folder, self._process_index = seconds, Path(workdir) / "hangs", process_index
    self._stopped = threading.Event()
    self.grace()

  def beat(self) -> None:
    """A step has ended: the next one is due within `seconds`."""
    self._due = time.monotonic() + self._seconds

  def grace(self) -> None:
    """Something starts that takes longer than a step: the next heartbeat is due within `GRACE` times `seconds`."""
    self._due = time.monotonic() + GRACE * self._seconds

  def __enter__(self) -> "Watchdog":
    if self._seconds:
      threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
    return self

  def __exit__(self, *_) -> None:
    self._stopped.set()

  def _watch(self) -> None:
    while not self._stopped.wait(min(1.0, self._seconds / 4)):
      if time.monotonic() > self._due:
        self._end()

  def _end(self) -> None:
    when = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    file = self._folder / f"{when}_process_{self._process_index}.txt"
    print(
      f"process {self._process_index} hangs: no step ended in time (config.watchdog_seconds = {self._seconds:g}); "
      f"stacks: {file}; exit code {EXIT_CODE}",
      file=sys.stderr,
      flush=True,
    )
    # What hangs may be the disk of the workdir: stderr comes first, and nothing waits for the file.
    faulthandler.dump_traceback(sys.stderr.fileno())
    writer = threading.Thread(target=self._write, args=(file,), daemon=True)
    writer.start()
    writer.join(5.0)
    os._exit(EXIT_CODE)

  def _write(self, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as out:
      faulthandler.dump_traceback(out)
