"""Kills a small run at random moments, again and again, and checks that it ends as if nothing had happened.

python -m benchmarks.kill_resume --kills 50
python -m benchmarks.kill_resume --kills 10 --signal SIGTERM

Each life of the run is a process of its own that is killed with SIGKILL after a random part of the time that the whole
run takes, and started again on the same workdir. Where it gets to its end, parameters, moving average and losses are
compared bit for bit with those of a run that nobody disturbed, and the next run begins. Exit code 1 where they differ.

With SIGTERM each life is told to end instead, which it does as when a machine is taken away: it saves and exits 0. How
long that takes is told too. A notice before it listens, while nothing is in memory that was not on disk, just ends it.
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
# Imported once by the server that all lives are forked from.
PRELOAD = ("uae_jax.training.initial", "uae_jax.training.loop", "uae_jax.report.page")


def make_config(total_steps: int):
  """One stage of the smoke run, saved every other step, without evaluation."""
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


def live(workdir: Path, total_steps: int) -> None:
  """One life of the run."""
  from uae_jax.commands.train import train

  train(make_config(total_steps), workdir)


def outcome(params: Path, metrics: Path) -> dict[str, np.ndarray]:
  """Everything that must be equal: name -> array.

  Args:
    params: folder of a finished stage's parameters.
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


def torment(
  folder: Path,
  live: Callable[[Path], None],
  outcome: Callable[[Path], dict],
  *,
  preload: Sequence[str],
  kills: int,
  seed: int,
  end_with: signal.Signals = signal.SIGKILL,
) -> dict:
  """Runs until so many lives have been killed and the last run is at its end.

  Args:
    folder: for the workdirs.
    live: runs in a workdir, from where it stopped, to the end; importable.
    outcome: of a finished workdir.
    preload: modules that all lives share.
    kills: how many.
    seed: of the moments.
    end_with: what a life is sent.

  Returns:
    {"kills", "runs", "seconds_whole", "differences", "seconds_to_exit"}: of a run that nobody disturbed; the names that
    were not bit-identical; and of the lives that ended themselves, with exit code 0, how long each took for it.

  Raises:
    RuntimeError: a life ended with an error.
  """
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(list(preload))

  def start(workdir: Path):
    process = context.Process(target=live, args=(workdir,))
    process.start()
    return process

  rng = np.random.default_rng(seed)
  for name in ("first", "whole"):  # The first one fills the compilation cache.
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
  parser.add_argument("--signal", choices=("SIGKILL", "SIGTERM"), default="SIGKILL", help="that a life is ended with")
  parser.add_argument("--steps", type=int, default=20, help="of an undisturbed run")
  parser.add_argument("--seed", type=int, default=0, help="of the moments")
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compilation_cache"))
    result = torment(
      folder,
      functools.partial(live, total_steps=options.steps),
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
