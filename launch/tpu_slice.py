"""The TPU VMs of a job: one node, or several nodes of one queued resource. Each method runs gcloud."""

import argparse
import dataclasses
from pathlib import Path
import sys

from launch.commands import EXISTS, NOT_FOUND, LaunchError, run, with_retries
from launch.job import Job

# States of a node or of a queued resource. Any other state needs manual inspection.
READY = "READY"
ABSENT = "ABSENT"
UNKNOWN = "UNKNOWN"
LOST = ("PREEMPTED", "TERMINATED", "SUSPENDED", "FAILED")
CHANGING = (
  *("CREATING", "STARTING", "RESTARTING", "REIMAGING", "REPAIRING", "STOPPING", "DELETING", "UNHIDING"),
  *("ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "SUSPENDING"),
)
SSH_RETRIES = 2


@dataclasses.dataclass(frozen=True)
class TpuSlice:
  """The slices of a job in Cloud TPU.

  Attributes:
    job: what to create.
    is_queued: they are nodes of a queued resource of the job's name.
    is_dry: print the commands instead of running them.
    backoff_seconds: wait before the first retry of ssh; doubles.
    batch_size: workers per batch of ssh; None: all.
    is_internal: the workers have internal addresses only.
  """

  job: Job
  is_queued: bool
  is_dry: bool
  backoff_seconds: float
  batch_size: str | None
  is_internal: bool

  @property
  def name(self) -> str:
    return self.job.name

  @property
  def nodes(self) -> list[str]:
    several = self.job.num_slices > 1
    return [f"{self.name}-{i}" for i in range(self.job.num_slices)] if several else [self.name]

  def gcloud(self, step: str, kind: str, verb: str, *words: str, captures: bool = False) -> str:
    place = [f"--{key}={value}" for key, value in (("zone", self.job.zone), ("project", self.job.project)) if value]
    # Only the alpha commands know batches of workers, several nodes and flex-start (Google Cloud SDK 528).
    alpha = ("--batch-size", "--node=", "--node-count", "--provisioning-model")
    track = ["alpha"] if any(word.startswith(alpha) for word in words) else []
    command = ["gcloud", *track, "compute", "tpus", kind, verb, *words, *place, "--quiet"]
    return run(step, command, is_dry=self.is_dry, captures=captures)

  def create(self, args: argparse.Namespace) -> None:
    """Creates the slices, or the request for them.

    Raises:
      LaunchError: they were not created, or only in part: the message says what is left.
    """
    job, wanted = self.job, self.job.shape
    print(wanted.cost(job.num_slices), file=sys.stderr, flush=True)
    flags = (
      [f"--accelerator-type={wanted.accelerator_type}"]
      if wanted.is_default_shape
      else [f"--type={wanted.generation.type_prefix}", f"--topology={wanted.topology}"]
    )
    version = args.runtime_version or wanted.generation.runtime
    flags += [f"--{'runtime-version' if self.is_queued else 'version'}={version}"]
    flags += ["--spot"] if job.spot else ["--reserved"] if job.reservation else []
    if job.flex_start:
      flags += ["--provisioning-model=flex-start", f"--max-run-duration={job.max_run_duration}"]
    flags += ["--internal-ips"] if self.is_internal else []
    flags += args.create_flag
    nodes = [f"--node-id={self.name}"]
    if job.num_slices > 1:
      nodes = [f"--node-prefix={self.name}", f"--node-count={job.num_slices}"]
    if self.is_queued:
      flags = [*nodes, *flags]
      flags += [f"--valid-until-duration={args.valid_until_duration}"] if args.valid_until_duration else []
    try:
      self.gcloud("create", "queued-resources" if self.is_queued else "tpu-vm", "create", self.name, *flags)
    except LaunchError as error:
      if error.cause is EXISTS:
        raise
      state = self.seen()
      message = f"{error}{self.leftover(state)}"
      if not error.is_passing or state not in (READY, *CHANGING):
        raise LaunchError(message, error.cause) from error
      print(message, file=sys.stderr)  # the answer was lost, not the request
    except KeyboardInterrupt:
      print(f"create: interrupted{self.leftover(self.seen())}", file=sys.stderr)
      raise

  def seen(self) -> str:
    """The state, or UNKNOWN if it cannot be had."""
    try:
      return self.state()
    except LaunchError:
      return UNKNOWN

  def leftover(self, state: str) -> str:
    """What exists in this state after a failure, as the end of an error message; empty if nothing does."""
    if state == UNKNOWN:
      return f". {self.name} may exist and be billed: look with status, end it with delete"
    return "" if state == ABSENT else f". {self.name} is {state} and is billed when it is ready: delete ends that"

  def delete(self, *, must_exist: bool = False, is_async: bool = False) -> None:
    """Deletes the slices.

    Args:
      must_exist: it is an error if there are none: with a wrong name or zone the right ones would stay.
      is_async: return before they are gone.

    Raises:
      LaunchError: they may still exist; the message says so.
    """
    # Without --force, gcloud does not delete a queued resource that has a node.
    flags = (["--force"] if self.is_queued else []) + (["--async"] if is_async else [])
    tries = 0

    def delete() -> None:
      nonlocal tries
      tries += 1
      try:
        self.gcloud("delete", "queued-resources" if self.is_queued else "tpu-vm", "delete", self.name, *flags)
      except LaunchError as error:
        # An earlier try may have succeeded although its connection was lost.
        if error.cause is not NOT_FOUND or (must_exist and tries == 1):
          raise

    try:
      with_retries(delete, retries=SSH_RETRIES, backoff_seconds=self.backoff_seconds)
    except LaunchError as error:
      raise LaunchError(f"{error}{self.leftover(self.seen())}", error.cause) from error

  def state(self) -> str:
    """State of the queued resource while it is not active, else of the first node that is not ready, else READY."""
    try:
      if self.is_queued:
        words = (self.name, "--format=value(state.state)")
        queued = self.gcloud("state", "queued-resources", "describe", *words, captures=True)
        if not self.is_dry and queued.strip() != "ACTIVE":
          return queued.strip()
      states = [
        self.gcloud("state", "tpu-vm", "describe", node, "--format=value(state)", captures=True).strip()
        for node in self.nodes
      ]
    except LaunchError as error:
      if error.cause is NOT_FOUND:
        return ABSENT
      raise
    return next((state for state in states if state != READY), READY)

  def connection_flags(self, worker: str) -> list[str]:
    batch = [f"--batch-size={self.batch_size}"] if self.batch_size and worker == "all" else []
    return [f"--worker={worker}", *batch, *(["--internal-ip"] if self.is_internal else [])]

  def ssh(self, step: str, script: str, *, worker: str = "all", node: str = "all", captures: bool = False) -> str:
    """Runs a script on one or all workers; the script must be idempotent because it may be retried."""
    flags = [*self.connection_flags(worker), f"--command={script}"]
    words, kind = [self.name, *flags], "tpu-vm"
    if self.job.num_slices > 1:
      words, kind = [self.name, f"--node={node}", *flags], "queued-resources"
    # A new slice takes a while to receive the SSH keys.
    return with_retries(
      lambda: self.gcloud(step, kind, "ssh", *words, captures=captures),
      retries=SSH_RETRIES,
      backoff_seconds=self.backoff_seconds,
    )

  def copy(self, step: str, file: Path, target: str) -> None:
    """Copies a file to the home folder of every worker, under the name `target`."""
    words, kind = [str(file), f"{self.name}:{target}", *self.connection_flags("all")], "tpu-vm"
    if self.job.num_slices > 1:
      words, kind = [*words, "--node=all"], "queued-resources"
    with_retries(
      lambda: self.gcloud(step, kind, "scp", *words), retries=SSH_RETRIES, backoff_seconds=self.backoff_seconds
    )
