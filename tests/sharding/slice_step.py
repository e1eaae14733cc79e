"""A step on a mesh of four devices of one or several processes, for tests of slices.

python -m tests.sharding.slice_step COORDINATOR NUM_PROCESSES PROCESS_ID
"""

import json
import sys

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from uae_jax import sharding
from uae_jax.training import processes

ROWS, WIDTH, STEPS = 8, 16, 3


def run(devices=None) -> dict:
  """Trains a linear model on `data` x `fsdp` = 2 x 2; returns losses and parameters."""
  mesh = sharding.make_mesh(data=2, fsdp=2, devices=devices)
  cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
  weight = jax.make_array_from_callback((WIDTH, WIDTH), cut, lambda rows: np.eye(WIDTH, dtype=np.float32)[rows])
  rows = np.random.default_rng(0).normal(size=(STEPS, ROWS, WIDTH)).astype(np.float32)
  part, count = processes.batch_part(mesh)

  @jax.jit
  def step(weight, batch):
    def loss(weight):
      return jnp.mean(jnp.square(batch @ sharding.gather(weight, "embed", None) - jnp.sin(batch)))

    value, gradient = jax.value_and_grad(loss)(weight)
    return weight - 0.1 * gradient, value

  losses = []
  with jax.set_mesh(mesh):
    for batch in rows:
      own = np.split(batch, count)[part]
      weight, value = step(weight, processes.place(own, sharding.batch_sharding(mesh), count))
      losses.append(float(value))
  whole = multihost_utils.process_allgather(weight, tiled=True) if jax.process_count() > 1 else np.asarray(weight)
  slices = [[device.process_index for device in row] for row in mesh.devices[:, :, 0]]
  return {"losses": losses, "weight": np.asarray(whole).tolist(), "processes": slices}


if __name__ == "__main__":
  processes.join(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
  print(json.dumps(run()))
