"""Cost of a checkpoint: how long a save blocks the step, until it is on disk, and how long a restore takes.

python -m benchmarks.checkpoints --megabytes 16 256 --folder DIR

The state is that of a stage with Adam and a moving average (four float32 values per parameter). The step blocks while
the arrays are copied; writing overlaps with the next steps. Results are medians over the repeats. The first save of a
process, which also opens the folder, is excluded.
"""

import argparse
import json
from pathlib import Path
import statistics
import tempfile
import time

ARRAYS = 16
COPIES = 4  # parameter, two moments, average


def measure(folder: Path, megabytes: float, repeats: int) -> dict[str, float]:
  """Measures the seconds that a save blocks, that the whole save takes, and that a restore takes."""
  import jax
  import jax.numpy as jnp

  from uae_jax.training.checkpoints import Checkpoints
  from uae_jax.training.optimizer import OptimizerOptions, make_optimizer
  from uae_jax.training.state import create

  size = int(megabytes * 2**20 / 4 / COPIES / ARRAYS)
  params = {f"kernel_{i}": jax.random.normal(jax.random.key(i), (size,), jnp.float32) for i in range(ARRAYS)}
  optimizer = make_optimizer(OptimizerOptions(learning_rate=1e-3), 10)
  state = create(params, lambda path: True, optimizer, jax.random.key(0), has_ema=True)
  jax.block_until_ready(state)
  checkpoints = Checkpoints(folder)
  stalls, saves, restores = [], [], []
  for step in range(repeats + 1):
    start = time.perf_counter()
    checkpoints.save(step, state, {}, {})
    stalls.append(time.perf_counter() - start)
    checkpoints.wait()
    saves.append(time.perf_counter() - start)
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(checkpoints.restore(state)[0])
    restores.append(time.perf_counter() - start)
  checkpoints.close()
  return {
    "megabytes": megabytes,
    "seconds_stall": statistics.median(stalls[1:]),
    "seconds_save": statistics.median(saves[1:]),
    "seconds_restore": statistics.median(restores),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--megabytes", type=float, nargs="+", default=[16, 256], help="sizes of the state")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--folder", type=Path, help="folder on the disk to measure; default: a temporary folder")
  parser.add_argument("--json", type=Path, help="also write the rows to this file")
  options = parser.parse_args()
  rows = []
  for megabytes in options.megabytes:
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
      rows.append(measure(Path(folder), megabytes, options.repeats))
  print("| state, MB | step waits, s | on disk after, s | resume reads, s |\n|---|---|---|---|")
  for row in rows:
    print("| {megabytes:.0f} | {seconds_stall:.3f} | {seconds_save:.3f} | {seconds_restore:.3f} |".format(**row))
  if options.json:
    options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
  main()
