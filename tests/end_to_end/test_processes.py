"""Two processes of four devices form one run: they train, save, stop and resume like one process of eight devices."""

import json
import os
from pathlib import Path
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.end_to_end import small_run
from tests.end_to_end.test_resume import STEPS, final_params, losses, short_config
from tests.end_to_end.test_smoke_run import CONFIG
from tests.truncate_files import truncate_files
from uae_jax.commands.train import train

TIMEOUT_SECONDS = 900


def start(*command: str, count: int = 2) -> list[subprocess.Popen]:
  """Starts processes of a run with four virtual devices each; replaces COORDINATOR and PROCESS_ID in `command`."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    coordinator = f"localhost:{probe.getsockname()[1]}"
  environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "4", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}

  def one(process_id: int) -> subprocess.Popen:
    words = [word.replace("COORDINATOR", coordinator).replace("PROCESS_ID", str(process_id)) for word in command]
    return subprocess.Popen(
      [sys.executable, "-m", *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

  return [one(process_id) for process_id in range(count)]


def finish(processes: list[subprocess.Popen], code: int = 0) -> list[str]:
  """Waits until all processes have ended with the exit code and returns their output; none outlives the test."""
  deadline = time.monotonic() + TIMEOUT_SECONDS
  try:
    outputs = [process.communicate(timeout=max(1.0, deadline - time.monotonic())) for process in processes]
  finally:
    for process in processes:
      process.kill()
  for process, (_, errors) in zip(processes, outputs, strict=True):
    assert process.returncode == code, errors
  return ["".join(output) for output in outputs]


def end_early(processes: list[subprocess.Popen], file: Path) -> list[str]:
  """Sends SIGTERM to process 0 once it has created `file`, which is after it listens and before its first step."""
  deadline = time.monotonic() + TIMEOUT_SECONDS
  while not file.exists() and time.monotonic() < deadline and all(process.poll() is None for process in processes):
    time.sleep(0.1)
  processes[0].send_signal(signal.SIGTERM)
  return finish(processes)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
  workdir = tmp_path_factory.mktemp("run") / "alone"
  small_run.run(workdir)
  return workdir


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
  """A notice to process 0 ends both processes; a file of process 1 is truncated; both resume from the same step."""
  workdir = tmp_path_factory.mktemp("run") / "together"
  command = ("tests.end_to_end.small_run", str(workdir), "COORDINATOR", "2", "PROCESS_ID")
  for output in finish(start(*command, "3")):
    assert "preempted, small: saved at step 4" in output
  checkpoints = workdir / "checkpoints"
  assert sorted(path.name for path in checkpoints.iterdir()) == ["2", "4"]
  truncate_files(checkpoints / "4" / "state" / "ocdbt.process_1")
  for output in finish(start(*command)):
    assert output.count("set aside as") == 1 and str(checkpoints / "4.damaged") in output
  assert sorted(path.name for path in checkpoints.iterdir()) == ["4", "4.damaged", "6"]
  return workdir


def small_params(workdir: Path) -> np.ndarray:
  return final_params(workdir / "checkpoints" / str(small_run.STEPS) / "params")["kernel"]


def test_two_processes_end_where_one_does(together, alone):
  """Covers a preemption notice, a truncated file and a restore from the step before."""
  np.testing.assert_allclose(small_params(together), small_params(alone), atol=1e-6)
  ours, theirs = losses(together), losses(alone)
  assert ours.keys() == theirs.keys() == set(range(1, small_run.STEPS + 1))
  for step in theirs:
    np.testing.assert_allclose(ours[step], theirs[step], rtol=1e-5)


def test_one_process_resumes_what_two_have_left(together, alone, tmp_path):
  """Discards the last step of two processes; one process of eight devices resumes from the step before."""
  workdir = shutil.copytree(together, tmp_path / "run")
  shutil.rmtree(workdir / "checkpoints" / str(small_run.STEPS))
  small_run.run(workdir)
  np.testing.assert_allclose(small_params(workdir), small_params(alone), atol=1e-6)


@pytest.mark.slow
def test_the_whole_program_in_two_processes(tmp_path):
  """Runs `uae-jax train` itself: networks, one stage, preemption, resume, evaluation and report."""
  train(short_config(), tmp_path / "alone")
  flags = [
    "--config.mesh.data=4",
    "--config.mesh.fsdp=2",
    "--config.clip.batch_size=8",
    f"--config.clip.total_steps={STEPS}",
    "--config.clip.save_every_steps=2",
    "--config.tensorboard=False",
  ]
  workdir = tmp_path / "together"
  command = ("uae_jax.cli", "train", f"--config={CONFIG}:smoke", f"--workdir={workdir}", "--config.stages=('clip',)")
  command += (*flags, "--coordinator=COORDINATOR", "--num_processes=2", "--process_id=PROCESS_ID")
  for output in end_early(start(*command), workdir / "checkpoints" / "clip"):
    assert "preempted, clip: saved at step" in output
  outputs = finish(start(*command))
  assert "report:" in outputs[0] and "report:" not in outputs[1]
  runs = (workdir, tmp_path / "alone")
  ours, theirs = (final_params(run / "checkpoints" / "clip" / str(STEPS) / "params") for run in runs)
  for path in theirs:
    # Softmax is invariant to a shift of all keys, so the gradient of the key bias is rounding noise, which AdamW scales
    # up. The same may happen to single elements elsewhere, hence the norm.
    if not path.endswith("attention/key/bias"):
      assert np.linalg.norm(ours[path] - theirs[path]) <= 1e-4 * np.linalg.norm(theirs[path]), path
  ours, theirs = (losses(run) for run in runs)
  assert ours.keys() == theirs.keys()
  for step in theirs:
    np.testing.assert_allclose(ours[step], theirs[step], rtol=1e-5)
  ours, theirs = (json.loads((run / "evaluation" / "clip.json").read_text()) for run in runs)
  assert ours.keys() == theirs.keys()
  for name in theirs:
    np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4, err_msg=name)
