"""Saving and restoring with Orbax: the state of stage 2, and all parameters at the end of a stage."""

from pathlib import Path
import shutil
import tempfile

import jax

from benchmarks.timing import Case
from benchmarks.world import World
from uae_jax import trees
from uae_jax.training.checkpoints import Checkpoints


def cases(world: World) -> dict:
  def opened(name):
    folder = Path(tempfile.gettempdir()) / f"benchmarks_checkpoint_{name}"
    shutil.rmtree(folder, ignore_errors=True)
    return Checkpoints(folder)

  def save():
    checkpoints, step = opened("save"), 0
    params = jax.block_until_ready(world.params)

    def run():
      nonlocal step
      step += 1
      checkpoints.save_final(step, params, {})

    return Case(run=run, unit="MB", amount=trees.size_bytes(params) / 1e6)

  def restore():
    checkpoints = opened("restore")
    checkpoints.save_final(1, world.params, {})
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), world.params)
    return Case(
      run=lambda: jax.block_until_ready(checkpoints.restore_final(abstract)),
      unit="MB",
      amount=trees.size_bytes(world.params) / 1e6,
    )

  return {"save all parameters": save, "restore all parameters": restore}
