"""A sweep that is killed, interrupted and preempted at random times ends bit for bit like an undisturbed one."""

import os
from pathlib import Path
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks.kill_resume import differences, outcome

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


def start(folder: Path) -> subprocess.Popen:
  return subprocess.Popen([*COMMAND, f"--workdir={folder}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def runs_of(sweep: subprocess.Popen) -> list[int]:
  """Process ids of the runs that a sweep has started."""
  return [int(pid) for pid in Path(f"/proc/{sweep.pid}/task/{sweep.pid}/children").read_text().split()]


def outcomes(folder: Path) -> dict[str, np.ndarray]:
  """Parameters and losses of all runs of a finished sweep."""
  found = {}
  for seed in SEEDS:
    run = folder / f"seed-{seed}"
    arrays = outcome(run / "checkpoints" / STAGE / str(STEPS) / "params", run / "metrics.jsonl")
    found |= {f"{seed} {name}": value for name, value in arrays.items()}
  return found


def disturb(folder: Path, schedule: random.Random, seconds: float, times: int) -> None:
  """Starts a sweep again and again, ends it in `times` ways, and lets the last one finish."""
  for _ in range(times):
    sweep = start(folder)
    try:
      sweep.wait(schedule.uniform(0.0, seconds))
    except subprocess.TimeoutExpired:
      way = schedule.choice(("preempt the sweep", "kill the sweep", "kill a run", "kill everything"))
      runs = runs_of(sweep)
      if way == "preempt the sweep":
        sweep.send_signal(signal.SIGTERM)
      if way in ("kill the sweep", "kill everything"):
        sweep.kill()
      if way in ("kill a run", "kill everything"):
        for run in runs[: 1 if way == "kill a run" else None]:
          os.kill(run, signal.SIGKILL)
    if sweep.poll() is None:
      sweep.wait()
    sweep.stderr.close()
  # A killed run counts as failed, as one that ran out of memory would.
  last = subprocess.run(
    [*COMMAND, f"--workdir={folder}", "--retry-failed"], capture_output=True, text=True, check=False
  )
  assert last.returncode == 0, last.stderr


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 100])
def test_a_disturbed_sweep_ends_as_if_nothing_had_happened(tmp_path, seeds, monkeypatch):
  if not Path("/proc/self/task").exists():
    pytest.skip("the processes of a sweep are found in /proc")
  # All sweeps share compiled programs, so that runs are ended in their steps and not only while they compile.
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compilation_cache"))
  begin = time.monotonic()
  sweep = start(tmp_path / "whole")
  errors = sweep.communicate()[1]
  seconds = time.monotonic() - begin
  assert sweep.returncode == 0, errors
  wanted = outcomes(tmp_path / "whole")
  for seed in range(seeds):
    disturb(tmp_path / str(seed), random.Random(seed), seconds, times=2)
    assert differences(outcomes(tmp_path / str(seed)), wanted) == [], seed
