"""Sweeps that are killed, interrupted and preempted at random times end bit for bit like undisturbed ones.

Once with the command and a stage of the small world, and a hundred times with the runner of sweeps and runs of a linear
model, which are forks of one process with all imports: starting Python and JAX anew a thousand times takes hours.
"""

from collections.abc import Callable
import contextlib
import functools
import multiprocessing
import os
from pathlib import Path
import random
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from benchmarks.kill_resume import differences, outcome
from tests.end_to_end import small_run
from uae_jax.sweeps import runner
from uae_jax.sweeps.points import Point
from uae_jax.training.preemption import Preempted

STAGE, STEPS, SEEDS = "clip", 6, ("0", "1")
COMMAND = (
  *(sys.executable, "-m", "uae_jax.cli", "sweep", "--config=configs/scenes.py:smoke", f"--config.stages={STAGE}"),
  *(
    f"--config.{STAGE}.total_steps={STEPS}",
    f"--config.{STAGE}.save_every_steps=2",
    "--config.evaluation.num_images=0",
  ),
  *("--config.tensorboard=false", f"--grid=config.seed={','.join(SEEDS)}", "--parallel=2"),
)
WAYS = ("preempt the sweep", "kill the sweep", "kill a run", "kill everything")

# Starts a sweep in a folder, after earlier failures also failed runs: (folder, retries failed) -> (process id,
# wait(seconds or None) -> exit code, or None if it goes on).
Start = Callable[[Path, bool], tuple[int, Callable[[float | None], int | None]]]


def runs_of(sweep: int) -> list[int]:
  """Process ids of the runs that a sweep has started."""
  with contextlib.suppress(FileNotFoundError):  # It has ended.
    return [int(pid) for pid in Path(f"/proc/{sweep}/task/{sweep}/children").read_text().split()]
  return []


def disturb(start: Start, folder: Path, schedule: random.Random, seconds: float, times: int) -> list[str]:
  """Starts a sweep again and again, ends it in `times` ways, and lets the last one finish; returns the ways."""
  ways = []
  for _ in range(times):
    sweep, wait = start(folder, False)
    if wait(schedule.uniform(0.0, seconds)) is not None:
      continue
    ways.append(schedule.choice(WAYS))
    runs = runs_of(sweep)
    if ways[-1] == "preempt the sweep":
      os.kill(sweep, signal.SIGTERM)
    if ways[-1] in ("kill the sweep", "kill everything"):
      os.kill(sweep, signal.SIGKILL)
    if ways[-1] in ("kill a run", "kill everything"):
      for run in runs[: 1 if ways[-1] == "kill a run" else None]:
        with contextlib.suppress(ProcessLookupError):
          os.kill(run, signal.SIGKILL)
    wait(None)
  # A killed run counts as failed, as one that ran out of memory would.
  assert start(folder, True)[1](None) == 0
  return ways


# --- The command ------------------------------------------------------------------------------------------------------


def start_command(folder: Path, retries_failed: bool):
  command = [*COMMAND, f"--workdir={folder}", *(["--retry-failed"] if retries_failed else [])]
  process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

  def wait(seconds: float | None) -> int | None:
    with contextlib.suppress(subprocess.TimeoutExpired):
      return process.wait(seconds)
    return None

  return process.pid, wait


def outcomes(folder: Path) -> dict[str, np.ndarray]:
  """Parameters and losses of all runs of a finished sweep."""
  found = {}
  for seed in SEEDS:
    run = folder / f"seed-{seed}"
    arrays = outcome(run / "checkpoints" / STAGE / str(STEPS) / "params", run / "metrics.jsonl")
    found |= {f"{seed} {name}": value for name, value in arrays.items()}
  return found


@pytest.mark.slow
def test_a_disturbed_sweep_ends_as_if_nothing_had_happened(tmp_path, monkeypatch):
  if not Path("/proc/self/task").exists():
    pytest.skip("the processes of a sweep are found in /proc")
  # All sweeps share compiled programs, so that runs are ended in their steps and not only while they compile.
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compilation_cache"))
  begin = time.monotonic()
  assert start_command(tmp_path / "whole", False)[1](None) == 0
  seconds = time.monotonic() - begin
  disturb(start_command, tmp_path / "disturbed", random.Random(0), seconds, times=2)
  assert differences(outcomes(tmp_path / "disturbed"), outcomes(tmp_path / "whole")) == []


# --- The runner -------------------------------------------------------------------------------------------------------

LENGTHS = (6, 8)


class Forked:
  """In place of `subprocess.Popen`: a run in a fork of the process of the sweep, with the same signals and locks."""

  def __init__(self, command, *, stdout, stderr, env, start_new_session):
    self.returncode = None
    workdir, steps = command[-2:]
    # A signal between the fork and the handlers of the run must not reach those of the sweep.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    self.pid = os.fork()
    if not self.pid:
      code = 1
      try:
        os.setsid()
        os.dup2(stdout.fileno(), 1)
        os.dup2(stdout.fileno(), 2)
        os.closerange(3, 1024)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        with contextlib.suppress(Preempted):
          small_run.run(Path(workdir), int(steps))
        code = 0
      finally:
        os._exit(code)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

  def poll(self) -> int | None:
    return self._wait(os.WNOHANG)

  def wait(self) -> int | None:
    return self._wait(0)

  def _wait(self, options: int) -> int | None:
    if self.returncode is None:
      pid, status = os.waitpid(self.pid, options)
      self.returncode = os.waitstatus_to_exitcode(status) if pid else None
    return self.returncode

  def send_signal(self, number: int) -> None:
    if self.poll() is None:
      os.kill(self.pid, number)

  def terminate(self) -> None:
    self.send_signal(signal.SIGTERM)


class SmallSweep(runner.Sweep):
  """A sweep whose runs are those of `small_run`."""

  def arguments(self, point: Point) -> list[str]:
    return [str(self.workdir(point)), point.name]


def run_sweep(folder: Path, retries_failed: bool) -> None:
  """Runs the points of a sweep, two at a time, as `uae-jax sweep` does; exits with 1 if one is not finished."""
  runner.subprocess = types.SimpleNamespace(Popen=Forked, STDOUT=subprocess.STDOUT)
  runner.POLL_SECONDS = 0.05
  # What the runner reads of a config to know whether a run is finished; `small_run` has no folder per stage.
  config = types.SimpleNamespace(runs=[("", "small")], evaluation=types.SimpleNamespace(num_images=0))
  points = tuple(Point(str(steps), ()) for steps in LENGTHS)
  sweep = SmallSweep(folder, "", (), points, {point.name: config for point in points})
  with contextlib.suppress(KeyboardInterrupt):
    runner.run_all(sweep, points, parallel=2, retry_failed=retries_failed, log=lambda line: None)
  sys.exit(any(sweep.state(point) != "finished" for point in points))


def start_fork(context, folder: Path, retries_failed: bool):
  process = context.Process(target=run_sweep, args=(folder, retries_failed))
  process.start()

  def wait(seconds: float | None) -> int | None:
    process.join(seconds)
    return process.exitcode

  return process.pid, wait


@pytest.mark.parametrize("seeds", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_sweeps_disturbed_by_any_schedule_end_as_if_nothing_had_happened(tmp_path, seeds):
  if not Path("/proc/self/task").exists():
    pytest.skip("the processes of a sweep are found in /proc")
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(["tests.end_to_end.small_run", "tests.end_to_end.test_sweep_kill"])
  start = functools.partial(start_fork, context)

  def found(folder: Path) -> dict[str, np.ndarray]:
    runs = ((steps, folder / str(steps)) for steps in LENGTHS)
    arrays = ((s, outcome(run / "checkpoints" / str(s) / "params", run / "metrics.jsonl")) for s, run in runs)
    return {f"{steps} {name}": value for steps, run in arrays for name, value in run.items()}

  for name in ("first", "whole"):  # The first one fills the compilation cache.
    begin = time.monotonic()
    assert start(tmp_path / name, False)[1](None) == 0
    seconds = time.monotonic() - begin
  wanted, ways = found(tmp_path / "whole"), []
  for seed in range(seeds):
    ways += disturb(start, tmp_path / str(seed), random.Random(seed), seconds, times=3)
    assert differences(found(tmp_path / str(seed)), wanted) == [], seed
  assert seeds < 100 or set(ways) == set(WAYS)
