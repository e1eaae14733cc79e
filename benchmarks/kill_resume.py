"""Kills a small run repeatedly at random times and checks that its results are those of an uninterrupted run.

python -m benchmarks.kill_resume --kills 50
python -m benchmarks.kill_resume --kills 10 --signal SIGTERM

The run is a separate process. It is killed with SIGKILL after a random fraction of the duration of a whole run, and
started again on the same workdir. Once it finishes, its parameters, moving average and losses are compared bit for bit
with those of an uninterrupted run, and the next run starts. The exit code is 1 if any differ.

With SIGTERM the process is asked to exit instead, as on a preemption: it saves and exits with 0, and the time that this
takes is reported. A SIGTERM before the handler is installed, when there is nothing unsaved, terminates the process.
"""

import argparse
from collections.abc import Callable, Sequence
import functools
import importlib.util
import json
import multiprocessing
import os
from pathlib import Path
import shutil
import signal
import sys
import tempfile
import time

import numpy as np

STAGE = "pretrain"
CONFIG = Path(__file__).parents[1] / "configs" / "scenes.py"
# Imported once by the server from which all processes are forked.
PRELOAD = ("uae_jax.training.initial", "uae_jax.training.loop", "uae_jax.report.page")


def make_config(total_steps: int):
  """Config of one stage of the smoke run, saved every other step, without evaluation."""
  spec = importlib.util.spec_from_file_location("scenes_config", CONFIG)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config("smoke")
  config.stages = (STAGE,)
  config[STAGE].total_steps = total_steps
  config[STAGE].save_every_steps = 2
  config[STAGE].ema_decay = 0.9
  config.evaluation.num_images = 0
  config.tensorboard = False
  return config.lock()


def run_once(workdir: Path, total_steps: int) -> None:
  """Runs the stage until it finishes or is killed."""
  from uae_jax.commands.train import train

  train(make_config(total_steps), workdir)


def outcome(params: Path, metrics: Path) -> dict[str, np.ndarray]:
  """Everything that must be equal between runs: name -> array.

  Args:
    params: folder of the parameters of a finished stage.
    metrics: the run's `metrics.jsonl`.
  """
  import orbax.checkpoint as ocp

  from uae_jax import trees

  found = ocp.StandardCheckpointer().restore(params.absolute())
  lines = [json.loads(line) for line in metrics.read_text().splitlines()]
  measured = {f"step {line['step']} {name}": np.asarray(line[name]) for line in lines for name in ("loss", "grad_norm")}
  return {path: np.asarray(leaf) for path, leaf in trees.items(found)} | measured


def differences(found: dict, wanted: dict) -> list[str]:
  return sorted(
    name
    for name in found.keys() | wanted.keys()
    if name not in found or name not in wanted or not np.array_equal(found[name], wanted[name])
  )


def kill_repeatedly(
  folder: Path,
  run_once: Callable[[Path], None],
  outcome: Callable[[Path], dict],
  *,
  preload: Sequence[str],
  kills: int,
  seed: int,
  end_with: signal.Signals = signal.SIGKILL,
) -> dict:
  """Kills and restarts runs until `kills` processes have been killed and the last run has finished.

  Args:
    folder: receives the workdirs.
    run_once: starts or resumes the run in a workdir and finishes it; importable.
    outcome: arrays to compare, from a finished workdir.
    preload: modules imported before processes are forked.
    kills: number of kills over all runs.
    seed: seed of the kill times.
    end_with: signal to send.

  Returns:
    "kills" and "runs"; "seconds_whole", the duration of an uninterrupted run; "differences", the names of arrays that
    were not bit-identical; "seconds_to_exit", the time to exit of each process that exited with 0 after the signal.

  Raises:
    RuntimeError: a process exited with an error.
  """
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(list(preload))

  def start(workdir: Path):
    process = context.Process(target=run_once, args=(workdir,))
    process.start()
    return process

  rng = np.random.default_rng(seed)
  for name in ("first", "whole"):  # The first run fills the compilation cache.
    begin = time.monotonic()
    process = start(folder / name)
    process.join()
    seconds = time.monotonic() - begin
    if process.exitcode:
      raise RuntimeError(f"the undisturbed run ended with exit code {process.exitcode}")
  wanted = outcome(folder / "whole")
  done, runs, different, seconds_to_exit = 0, 0, differences(outcome(folder / "first"), wanted), []
  while done < kills:
    workdir = folder / f"run_{runs}"
    is_alive = True
    while is_alive:
      process = start(workdir)
      process.join(rng.uniform(0.0, seconds) if done < kills else None)
      if process.exitcode is None:
        begin = time.monotonic()
        os.kill(process.pid, end_with)
        process.join()
        done += 1
        if process.exitcode == 0:
          seconds_to_exit.append(round(time.monotonic() - begin, 2))
        elif process.exitcode != -end_with:
          raise RuntimeError(f"{workdir}: kill {done} ended a life with exit code {process.exitcode}")
      elif process.exitcode:
        raise RuntimeError(f"{workdir}: after {done} kills a life ended with exit code {process.exitcode}")
      else:
        is_alive = False
    runs += 1
    different += differences(outcome(workdir), wanted)
    shutil.rmtree(workdir)
  return {
    "kills": done,
    "runs": runs,
    "seconds_whole": round(seconds, 1),
    "differences": different,
    "seconds_to_exit": seconds_to_exit,
  }


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=50)
  parser.add_argument(
    "--signal", choices=("SIGKILL", "SIGTERM"), default="SIGKILL", help="signal that ends each process"
  )
  parser.add_argument("--steps", type=int, default=20, help="steps of an uninterrupted run")
  parser.add_argument("--seed", type=int, default=0, help="seed of the kill times")
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compilation_cache"))
    result = kill_repeatedly(
      folder,
      functools.partial(run_once, total_steps=options.steps),
      lambda run: outcome(run / "checkpoints" / STAGE / str(options.steps) / "params", run / "metrics.jsonl"),
      preload=PRELOAD,
      kills=options.kills,
      seed=options.seed,
      end_with=signal.Signals[options.signal],
    )
  print(json.dumps(result))
  return 1 if result["differences"] else 0


if __name__ == "__main__":
  sys.exit(main())
