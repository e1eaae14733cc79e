"""Communication between the processes of a run; no communication if there is only one process."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import json
import os
from typing import Any, TypeVar

from absl import logging
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

# Set in every process of a cluster that JAX recognizes: Cloud TPU pods, GKE, Slurm, Open MPI, Kubernetes jobs.
CLUSTER_VARIABLES = (
  "CLOUD_TPU_TASK_ID",
  "TPU_PROCESS_ADDRESSES",
  "MEGASCALE_COORDINATOR_ADDRESS",
  "SLURM_JOB_ID",
  "OMPI_MCA_orte_hnp_uri",
  "JOB_COMPLETION_INDEX",
)
Item = TypeVar("Item")
FLAGS = "--coordinator=HOST:PORT --num_processes=N --process_id=I"


def join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
  """Connects this process to the others of the run; must be called before any use of a device.

  On Cloud TPU, Slurm, Open MPI and Kubernetes no flags are needed, because the environment provides them. Elsewhere a
  process without flags is a run with one process.

  Args:
    coordinator: HOST:PORT of process 0.
    num_processes: number of processes in the run.
    process_id: index of this process.

  Raises:
    ValueError: only some of the three flags are given, or the cluster provides too little information.
  """
  given = [value is not None for value in (coordinator, num_processes, process_id)]
  if any(given) and not all(given):
    raise ValueError(f"a run of several processes needs {FLAGS} in each of them")
  if all(given):
    jax.distributed.initialize(coordinator, num_processes, process_id)
    return
  try:
    jax.distributed.initialize()
  except RuntimeError as error:
    # In a notebook or a test JAX has been used before, or this process has joined already. A process of a cluster that
    # went on alone would train a run of its own on the same workdir.
    if not jax.distributed.is_initialized() and any(os.environ.get(name) for name in CLUSTER_VARIABLES):
      raise ValueError(f"cannot join the other processes ({error}): start the run in a new process") from error
  except ValueError as error:
    # This is the message of JAX where it finds no cluster. After any other error, continuing would start N separate
    # runs on one workdir.
    if "coordinator_address should be defined" not in str(error):
      raise ValueError(f"cannot join the other processes ({error}): say {FLAGS}") from error
    if sign := sign_of_others():
      raise ValueError(
        f"{sign} is a sign of other processes, but JAX found no cluster: in Kubernetes without TPUs, install jax[k8s]; "
        f"elsewhere say {FLAGS}"
      ) from error


def sign_of_others() -> str:
  """The variable by which a launcher says that there are other processes, as NAME=VALUE; "" if none does."""
  for name, is_sign in (
    ("MEGASCALE_NUM_SLICES", lambda value: value != "1"),
    ("JOB_COMPLETION_INDEX", lambda value: value != "0"),
    ("TPU_WORKER_HOSTNAMES", lambda value: "," in value),
  ):
    value = os.environ.get(name)
    if value and is_sign(value):
      return f"{name}={value}"
  return ""


def name_logs() -> None:
  """Prefixes the lines that absl logs with the index of this process, if there are several."""
  if jax.process_count() > 1:
    logging.get_absl_handler().setFormatter(_Formatter(f"[process {jax.process_index()}] "))


class _Formatter(logging.PythonFormatter):
  """absl's format of a line, with a prefix."""

  def __init__(self, prefix: str):
    super().__init__()
    self._prefix = prefix

  def format(self, record) -> str:
    return self._prefix + super().format(record)


class OtherProcessError(ValueError):
  """Raised in every process by the exchange in which one of them says that it failed."""


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Context of work that ends in all processes or fails in all.

  A process that fails in it says so in place of its next exchange, so that the others raise there and do not wait
  forever. All processes leave it together.
  """
  try:
    yield
    gather(None)
  except OtherProcessError:
    raise
  except Exception as error:
    if jax.process_count() > 1:
      _exchange({"error": " ".join(str(error).split()) or type(error).__name__})
    raise


def gather(value: Any) -> list:
  """Gathers a JSON value of every process, in the order of the processes, on all of them.

  Raises:
    OtherProcessError: another process failed, see `together`.
  """
  if jax.process_count() == 1:
    return [value]
  parts = _exchange({"value": value})
  for process, part in enumerate(parts):
    if "error" in part:
      raise OtherProcessError(f"process {process} failed: {part['error']}")
  return [part["value"] for part in parts]


def _exchange(value: dict) -> list[dict]:
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.int32(len(data)))
  rows = multihost_utils.process_allgather(np.resize(data, int(lengths.max())))
  return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def of_first(value: Any) -> Any:
  """Returns the value of process 0 on every process, for values that may differ, such as times or file listings."""
  return gather(value)[0]


def on_first(function: Callable[[], object]) -> None:
  """Calls `function` in process 0 only, while the others wait; for writing to a shared disk.

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


def value_of_first(function: Callable[[], Any]) -> Any:
  """Calls `function` in process 0 only, and returns its JSON value on every process; raises as `on_first` does."""
  values: list[Any] = []
  on_first(lambda: values.append(function()))
  return of_first(values[0] if values else None)


def share(items: Sequence[Item]) -> list[Item]:
  """Returns the items of this process: each N-th one of N processes."""
  return list(items[jax.process_index() :: jax.process_count()])


def merge(part: Mapping[str, Any]) -> dict[str, Any]:
  """Merges the JSON objects of all processes; none returns before all have called it."""
  return {name: value for each in gather(dict(part)) for name, value in each.items()}


def batch_part(mesh: Mesh) -> tuple[int, int]:
  """Returns (index, count): the part of a global batch that this process loads, and the number of parts.

  Processes along the same `tensor` axis load the same part.
  """
  rows = mesh.devices.reshape(-1, mesh.shape["tensor"])
  parts = {}
  for process in sorted({device.process_index for device in mesh.devices.flat}):
    own = tuple(i for i, row in enumerate(rows) if any(device.process_index == process for device in row))
    parts[process] = own
  distinct = sorted(set(parts.values()))
  return distinct.index(parts[jax.process_index()]), len(distinct)


def place(batch: dict, sharding: NamedSharding, num_parts: int) -> dict:
  """Makes global arrays from this process's part of a batch."""

  def leaf(x: np.ndarray) -> jax.Array:
    return jax.make_array_from_process_local_data(sharding, x, (num_parts * x.shape[0], *x.shape[1:]))

  return jax.tree.map(leaf, batch)


class AnyProcess:
  """Non-blocking any() across processes: each call returns the result of the previous one.

  The reduction runs on the devices, between the steps, and its result is read in the next call, so no process waits for
  it. Every process must make the same number of calls. With one process, a call returns its own flag.
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
