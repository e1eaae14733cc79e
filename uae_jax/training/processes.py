"""What the processes of a run agree on. One process alone talks to nobody."""

from collections.abc import Callable
import json
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

FLAGS = "--coordinator=HOST:PORT --num_processes=N --process_id=I"


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
  """Makes this process one of a run's; to be called before anything touches a device.

  On Cloud TPU, Slurm, Open MPI and Kubernetes no flag is needed: each process is told its place. Elsewhere a process
  without flags is a run of its own.

  Raises:
    ValueError: some of the three flags are missing, or the cluster tells too little.
  """
  given = [value is not None for value in (coordinator, num_processes, process_id)]
  if any(given) and not all(given):
    raise ValueError(f"a run of several processes needs {FLAGS} in each of them")
  if all(given):
    jax.distributed.initialize(coordinator, num_processes, process_id)
    return
  try:
    jax.distributed.initialize()
  except ValueError as error:
    # What jax says where it finds no cluster. Anything else must not start N runs on one workdir.
    if "coordinator_address should be defined" not in str(error):
      raise ValueError(f"cannot join the other processes ({error}): say {FLAGS}") from error


def gather(value: Any) -> list:
  """The JSON values of all processes, in their order, on every process."""
  if jax.process_count() == 1:
    return [value]
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.int32(len(data)))
  rows = multihost_utils.process_allgather(np.resize(data, int(lengths.max())))
  return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def of_first(value: Any) -> Any:
  """What process 0 says, where clocks or disks may show different things to different processes."""
  return gather(value)[0]


def on_first(function: Callable[[], None]) -> None:
  """Lets process 0 alone touch the shared disk, while the others wait.

  Raises:
    ValueError: process 0 raised a `ValueError` or `OSError`; every process raises it.
  """
  error = ""
  if jax.process_index() == 0:
    try:
      function()
    except (ValueError, OSError) as problem:
      if jax.process_count() == 1:
        raise
      error = str(problem)
  error = of_first(error)
  if error:
    raise ValueError(error)


def batch_part(mesh: Mesh) -> tuple[int, int]:
  """(index, count): which part of a global batch this process loads, of how many.

  Processes that `tensor` spans load the same part.
  """
  rows = mesh.devices.reshape(-1, mesh.shape["tensor"])
  parts = {}
  for process in sorted({device.process_index for device in mesh.devices.flat}):
    own = tuple(i for i, row in enumerate(rows) if any(device.process_index == process for device in row))
    parts[process] = own
  distinct = sorted(set(parts.values()))
  return distinct.index(parts[jax.process_index()]), len(distinct)


def place(batch: dict, sharding: NamedSharding, num_parts: int) -> dict:
  """Global arrays of this process's part of a batch."""

  def leaf(x: np.ndarray) -> jax.Array:
    return jax.make_array_from_process_local_data(sharding, x, (num_parts * x.shape[0], *x.shape[1:]))

  return jax.tree.map(leaf, batch)


class AnyProcess:
  """Whether a flag is up on any process, the same answer on all of them, one call late.

  The question goes to the devices with the steps and is read when it is asked again, so nobody waits for it. Every
  process must ask equally often.
  """

  def __init__(self, mesh: Mesh):
    self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._any = jax.jit(lambda flags: flags.any(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    self._asked = None

  def __call__(self, flag: bool) -> bool:
    if jax.process_count() == 1:
      return flag
    before = self._asked
    flags = np.full(jax.local_device_count(), flag)
    self._asked = self._any(jax.make_array_from_process_local_data(self._sharding, flags))
    return before is not None and bool(before)
