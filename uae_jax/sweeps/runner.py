"""Runs the points of a sweep as processes of this machine, and knows which are finished, failed or open."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import fcntl
import os
from pathlib import Path
import re
import signal
import subprocess
import sys
import threading
import time

from uae_jax.files import write_whole
from uae_jax.options import Experiment
from uae_jax.report.progress import is_finished
from uae_jax.sweeps.points import Point
from uae_jax.training import watchdog

TRAIN = (sys.executable, "-m", "uae_jax.cli", "train")
FAILURES = "failures"
POLL_SECONDS = 0.5
# A run that hangs is started again so many times.
MOST_HANGS = 3


@dataclasses.dataclass(frozen=True)
class Sweep:
  """A sweep on disk.

  Attributes:
    folder: holds a workdir per point, `logs/` and `failures/`.
    config: FILE[:VARIANT], as for `uae-jax train`.
    common: flags of every run.
    points: the runs.
    experiments: name of a point -> its config.
  """

  folder: Path
  config: str
  common: tuple[str, ...]
  points: tuple[Point, ...]
  experiments: Mapping[str, Experiment]

  def experiment(self, point: Point) -> Experiment:
    return self.experiments[point.name]

  def workdir(self, point: Point) -> Path:
    return self.folder / point.name

  def arguments(self, point: Point) -> list[str]:
    """Arguments of `uae-jax train` that run or repeat a point."""
    return [f"--config={self.config}", f"--workdir={self.workdir(point)}", *self.common, *point.flags]

  def error(self, point: Point) -> str:
    """The last line of a failed run; "" if it has not failed."""
    file = self.folder / FAILURES / f"{point.name}.txt"
    return file.read_text() if file.exists() else ""

  def state(self, point: Point) -> str:
    """State of a point: "finished", "failed", "started" or "new"."""
    workdir = self.workdir(point)
    if is_finished(workdir, self.experiment(point)):
      return "finished"
    return "failed" if self.error(point) else "started" if workdir.exists() else "new"


def run_all(
  sweep: Sweep,
  points: Sequence[Point],
  *,
  parallel: int,
  retry_failed: bool,
  is_enough: Callable[[Point], bool] = lambda point: False,
  log: Callable[[str], None] = print,
) -> None:
  """Runs those points that are not finished, `parallel` at a time; each has a share of the cores or GPUs.

  A run that fails does not end the others; its last line is kept in `failures/`. A run that hangs, by its own watchdog,
  is started again. A run that still goes on from an earlier, killed sweep is waited for. SIGTERM and Ctrl-C are passed
  on, so that runs save; the same sweep then resumes.

  Args:
    sweep: the sweep.
    points: those of its points that are wanted.
    parallel: number of processes at a time.
    retry_failed: whether to run those again that have failed.
    is_enough: (point) -> whether a run is far enough for now; it is then asked to save and stop.
    log: receives a line when a run starts or ends.

  Raises:
    KeyboardInterrupt: the sweep was interrupted.
  """
  shares = [share(slot, parallel) for slot in range(parallel)]
  waiting = []
  for point in points:
    if sweep.state(point) == "finished" or is_enough(point):
      log(f"{point.name}: done before")
    elif sweep.error(point) and not retry_failed:
      log(f"{point.name}: failed before: {sweep.error(point)}; --retry-failed runs it again")
    else:
      waiting.append(point)
  (sweep.folder / "logs").mkdir(parents=True, exist_ok=True)
  (sweep.folder / FAILURES).mkdir(exist_ok=True)
  running: dict[int, tuple[Point, subprocess.Popen]] = {}
  hangs: dict[str, int] = {}
  # No `threading.Event`: its `set` in a handler waits for ever if the signal comes inside of its `wait`.
  interrupts: list[int] = []

  def interrupt(number: int, _: object) -> None:
    if interrupts and number == signal.SIGINT:
      raise KeyboardInterrupt("its runs save and end by themselves")
    interrupts.append(number)

  handlers = {
    number: signal.signal(number, interrupt)
    for number in (signal.SIGTERM, signal.SIGINT)
    if threading.current_thread() is threading.main_thread()
  }
  try:
    while running or (waiting and not interrupts):
      for slot in set(range(parallel)) - set(running):
        if waiting and not interrupts:
          point = waiting.pop(0)
          if process := start(sweep, point, *shares[slot]):
            running[slot] = point, process
            log(f"{point.name}: starts")
          elif sweep.state(point) != "finished":
            waiting.append(point)
      time.sleep(POLL_SECONDS)
      stop([process for point, process in running.values() if interrupts or is_enough(point)])
      for slot, (point, process) in list(running.items()):
        if process.poll() is None:
          continue
        del running[slot]
        log(f"{point.name}: {note_end(sweep, point, process.returncode, bool(interrupts))}")
        hangs[point.name] = hangs.get(point.name, 0) + (process.returncode == watchdog.EXIT_CODE)
        if process.returncode == watchdog.EXIT_CODE and hangs[point.name] <= MOST_HANGS:
          waiting.insert(0, point)
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)
    for _, process in running.values():  # only after an error in this function
      process.terminate()
  if interrupts:
    raise KeyboardInterrupt


def start(sweep: Sweep, point: Point, environment: dict[str, str], cores: set[int] | None) -> subprocess.Popen | None:
  """Starts a run, whose output is appended to its log; None if a process of an earlier sweep is still running it."""
  command = [*TRAIN, *sweep.arguments(point)]
  cache = {"JAX_COMPILATION_CACHE_DIR": str(sweep.folder.absolute() / "compilation_cache")}
  with (sweep.folder / "logs" / f"{point.name}.log").open("ab") as out:
    try:
      # The process inherits the lock with its output, and so keeps it for as long as it lives.
      fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return None
    (sweep.folder / FAILURES / f"{point.name}.txt").unlink(missing_ok=True)
    # In a session of its own: Ctrl-C in a terminal reaches the sweep only, which passes it on as SIGTERM.
    process = subprocess.Popen(
      command, stdout=out, stderr=subprocess.STDOUT, env=cache | os.environ | environment, start_new_session=True
    )
  if cores:
    os.sched_setaffinity(process.pid, cores)  # XLA has a thread per core that the process may use
  return process


def stop(processes: Sequence[subprocess.Popen]) -> None:
  """Asks runs to save and end, all at the same time, and waits for them."""
  for process in processes:
    process.send_signal(signal.SIGTERM)
  for process in processes:
    process.wait()


def note_end(sweep: Sweep, point: Point, exit_code: int, is_interrupted: bool) -> str:
  """Describes how a run ended, and keeps the last line of a failed one."""
  if exit_code == 0 or is_interrupted:
    return "finished" if exit_code == 0 and sweep.state(point) == "finished" else "stopped"
  with (sweep.folder / "logs" / f"{point.name}.log").open("rb") as file:
    file.seek(max(0, file.seek(0, os.SEEK_END) - 2**14))
    lines = re.split(r"[\r\n]+", file.read().decode(errors="replace"))
  said = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
  how = signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"
  write_whole(sweep.folder / FAILURES / f"{point.name}.txt", f"{said} ({how})")
  return f"failed: {said} ({how})"


def share(slot: int, parallel: int) -> tuple[dict[str, str], set[int] | None]:
  """(environment, cores) of the processes in a slot: its part of the GPUs if there are some, else of the cores.

  Raises:
    ValueError: the devices cannot be shared out.
  """
  if parallel == 1:
    return {}, None
  if list(Path("/dev").glob("accel*")):
    raise ValueError("--parallel: one process holds all TPU chips of a host; start the runs with --launcher instead")
  if gpus := visible_gpus():
    if len(gpus) < parallel:
      raise ValueError(f"--parallel={parallel}: there are {len(gpus)} GPUs, and a run needs one of its own")
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[slot::parallel])}, None
  if not hasattr(os, "sched_setaffinity"):
    return {}, None
  cores = sorted(os.sched_getaffinity(0))
  return {}, set(cores[slot::parallel]) or {cores[slot % len(cores)]}


def visible_gpus() -> list[str]:
  """Numbers of the NVIDIA GPUs that processes may use; empty if there are none."""
  if "CUDA_VISIBLE_DEVICES" in os.environ:
    return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
  numbers = [re.fullmatch(r"nvidia(\d+)", path.name) for path in Path("/dev").glob("nvidia*")]
  return sorted((match[1] for match in numbers if match), key=int)
