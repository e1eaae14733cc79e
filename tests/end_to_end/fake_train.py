"""Stands in for `uae-jax train` in tests of sweeps: writes the files of a run without training.

python -m tests.end_to_end.fake_train --config=FILE --workdir=DIR [--config.FIELD=VALUE ...]

The reward after the last stage is its learning rate times its temperature; a temperature above 1.5 fails. On SIGTERM it
exits with 0 after the step, like a preempted run.
"""

import json
from pathlib import Path
import signal
import sys
import time

from uae_jax.commands import config_file
from uae_jax.commands.command_line import Parser
from uae_jax.training.workdir import open_workdir

SECONDS_PER_STEP = 0.02


def main() -> int:
  parser = Parser("train", "Writes the files of a run.")
  parser.add_argument("--workdir", required=True)
  arguments, config = config_file.parse(parser, sys.argv[1:])
  workdir, is_preempted = Path(arguments.workdir), []
  signal.signal(signal.SIGTERM, lambda *_: is_preempted.append(True))
  open_workdir(workdir, config)
  folder, name = config.runs[-1]
  section = config.section(name)
  temperature = section.options.temperature
  if temperature > 1.5:
    print(f"the loss of {workdir.name} is not finite", file=sys.stderr)
    return 1
  metrics = workdir / "metrics.jsonl"
  step = len(metrics.read_text().splitlines()) if metrics.exists() else 0
  while step < section.total_steps:
    if is_preempted:
      return 0
    time.sleep(SECONDS_PER_STEP)
    step += 1
    reward = section.optimizer.learning_rate * temperature * step
    record = {"stage": name, "step": step, "round": 0, "reward": reward, "seconds_step": SECONDS_PER_STEP}
    with metrics.open("a") as out:
      out.write(json.dumps(record | {"seconds": step * 0.1, "useful_seconds": step * SECONDS_PER_STEP}) + "\n")
  (workdir / "checkpoints" / folder / str(step) / "params").mkdir(parents=True)
  (workdir / "evaluation").mkdir()
  figures = {"reward_similarity": section.optimizer.learning_rate * temperature, "psnr": 20.0 + config.seed}
  (workdir / "evaluation" / f"{folder}.json").write_text(json.dumps(figures))
  return 0


if __name__ == "__main__":
  sys.exit(main())
