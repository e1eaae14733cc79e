"""The weights that the suite `learning` starts from: those of a run of the small world after stage 1, in one file.

python -m benchmarks.learning runs/demo start.npz
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np

from uae_jax import sharding, trees
from uae_jax.data.processing import Processor
from uae_jax.options import Experiment
from uae_jax.plain import from_plain, to_plain
from uae_jax.training import sizes
from uae_jax.training.build import Built, build

CONFIG, BEFORE = "config", "cold_start"


def write(workdir: Path, target: Path) -> None:
  """Reads the newest checkpoint of stage 1 of a run, and writes its parameters and the run's config.

  Raises:
    ValueError: the run has not finished stage 1.
  """
  from uae_jax.training import restore  # Imported late: needs Orbax, which a reader of the file does not.

  config = restore.run_config(workdir)
  processor = Processor.from_folder(workdir / "processor")
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  abstract = build(config, sizes.read(workdir), processor, mesh).abstract_params
  finished = restore.finished_steps(workdir / "checkpoints" / BEFORE)
  if not finished:
    raise ValueError(f"{workdir}: stage {BEFORE} is not finished")
  params = restore.read_tree(finished[0], abstract)
  text = np.frombuffer(json.dumps(to_plain(config)).encode(), np.uint8)
  np.savez_compressed(target, **{CONFIG: text}, **{path: np.asarray(leaf) for path, leaf in trees.items(params)})


def read(file: Path, processor: Processor) -> tuple[Experiment, Built, dict]:
  """Reads what `write` wrote: (config of the run, its networks, parameters)."""
  with np.load(file) as stored:
    config = from_plain(Experiment, json.loads(stored[CONFIG].tobytes()), "config")
    named = {kind: sizes.fresh_embedder(kind, config.model) for kind, source in config.embedders.items() if source}
    uae = sizes.named_uae(config.model, processor, config.lora)
    built = build(config, sizes.Sizes(uae, named), processor, sharding.make_mesh(devices=jax.devices()[:1]))
    places = dict(trees.items(built.shardings))
    params = trees.from_items((path, jax.device_put(stored[path], place)) for path, place in places.items())
  return config, built, params


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("workdir", type=Path)
  parser.add_argument("target", type=Path)
  arguments = parser.parse_args()
  write(arguments.workdir, arguments.target)


if __name__ == "__main__":
  main()
