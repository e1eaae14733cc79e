"""A run on TPU VMs: set up the workers, start, look, stop, and bring it back after a preemption."""

import argparse
from pathlib import Path
import shlex
import sys
import tempfile
import time

from launch import worker_scripts as scripts
from launch.commands import TAKEN_AWAY, LaunchError, run, with_retries
from launch.far_side import export_secrets
from launch.job import BUCKET_FOLDER, HUNG_EXIT_CODE, ROOT
from launch.tpu_slice import ABSENT, CHANGING, LOST, READY, TpuSlice


def setup(target: TpuSlice, args: argparse.Namespace) -> None:
  """Installs code and packages on every worker and mounts the bucket. May be repeated."""
  if args.repository:
    code = scripts.CLONE.format(repository=shlex.quote(args.repository), ref=shlex.quote(args.ref))
  else:
    archive = ROOT / "build" / f"{target.name}.tar.gz"
    if not target.is_dry:
      archive.parent.mkdir(exist_ok=True)
    git = ["git", "-C", str(ROOT)]
    if run("setup", [*git, "status", "--porcelain"], is_dry=target.is_dry, captures=True):
      print(f"note: uncommitted changes are not copied, only {args.ref}", file=sys.stderr)
    run("setup", [*git, "archive", "--format=tar.gz", f"--output={archive}", args.ref], is_dry=target.is_dry)
    target.copy("setup", archive, scripts.ARCHIVE)
    code = scripts.UNPACK
  bucket = target.job.bucket
  mount = scripts.MOUNT.format(bucket=shlex.quote(bucket), folder=BUCKET_FOLDER) if bucket else ""
  busy = 'if is_running; then echo "ERROR: $(hostname): a run is going on, stop it first" >&2; exit 3; fi\n'
  target.ssh("setup", "set -eo pipefail\n" + scripts.IS_RUNNING + busy + code + scripts.INSTALL + mount)


def start(target: TpuSlice) -> None:
  """Starts `uae-jax train` detached on every worker on which it is not running."""
  job = target.job
  if target.is_dry:
    hidden = dict.fromkeys(job.local_env_names, "...")
    variables = job.literal_env | hidden
  else:
    variables = job.literal_env | job.local_env()
  if variables:
    # In a file that only its owner can read: a command would show them in its process list, here and on the workers.
    with tempfile.TemporaryDirectory() as folder:
      file = Path(folder) / scripts.ENVIRONMENT
      file.touch(mode=0o600)
      file.write_text("".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items()))
      if target.is_dry:
        print(f"# {file} has the variables {', '.join(variables)}")
      target.copy("start", file, scripts.ENVIRONMENT)
  script = scripts.START.format(secrets=export_secrets(job), flags=shlex.join(job.train))
  target.ssh("start", "set -e\n" + scripts.IS_RUNNING + script)


def stop(target: TpuSlice) -> None:
  """Sends SIGTERM, on which the run saves and exits; sends SIGKILL after the job's grace."""
  target.ssh("stop", scripts.IS_RUNNING + scripts.STOP.format(seconds=target.job.grace_seconds))


def worker_states(target: TpuSlice) -> dict[str, str]:
  """Host -> state of its run: running, none, lost, preempted, finished or `failed <exit code>`."""
  lines = target.ssh("status", scripts.IS_RUNNING + scripts.STATUS, captures=True).splitlines()
  return {line.split()[1]: " ".join(line.split()[2:]) for line in lines if line.startswith("uae-run ")}


def status(target: TpuSlice) -> None:
  """Prints the state of the slices and, if they are ready, of the run on every worker."""
  state = target.state()
  if target.is_dry:
    worker_states(target)
    return
  print(f"{target.name}: {state}")
  if state == READY:
    for host, run_state in sorted(worker_states(target).items()):
      print(f"  {host}: {run_state}")


def resume(target: TpuSlice, args: argparse.Namespace) -> None:
  """Brings the slices up, recreating them if they were preempted, and starts the run on all workers.

  Raises:
    LaunchError: a step failed, or the new slices were preempted immediately.
  """
  if target.is_dry:
    print(f"# as if {target.name} had been preempted")
    target.state()
    target.delete()
    target.create(args)
  else:
    target.job.local_env()  # a missing variable is reported before anything is created
  is_created = False
  while not target.is_dry and (state := target.state()) != READY:
    if state in (*LOST, ABSENT):
      if is_created:
        raise LaunchError(f"create: {target.name} is {state} after it was created", TAKEN_AWAY)
      if state in LOST or target.is_queued:
        # A queued resource without its nodes also says that something is absent.
        target.delete()
      target.create(args)
      is_created = True
    elif state in CHANGING:
      time.sleep(args.poll_seconds)
    else:
      raise LaunchError(f"resume: {target.name} is {state}: bring it to {READY}, or delete it")
  # A slice can lose a single worker: the run on the others is stopped, because it would wait for that worker.
  stop(target)
  setup(target, args)
  start(target)


def watch(target: TpuSlice, args: argparse.Namespace) -> None:
  """Starts the run if it is not running, and restarts it after every preemption, until it has finished.

  Raises:
    LaunchError: training itself failed, there were too many restarts, or an error is not passing.
  """
  if target.is_dry:
    resume(target, args)
    worker_states(target)
    if args.delete:
      target.delete()
    return

  def persistently(function):
    def attempt():
      try:
        return function()
      except LaunchError as error:
        # Any error on a slice that is being preempted counts as passing.
        if not error.is_passing and target.state() in (*LOST, *CHANGING):
          raise LaunchError(str(error), TAKEN_AWAY) from error
        raise

    return with_retries(attempt, retries=args.max_retries, backoff_seconds=args.backoff_seconds)

  def look() -> set[str]:
    """The set of the workers' states; empty if the slice is not ready."""
    return set(worker_states(target).values()) if target.state() == READY else set()

  starts = 0
  while (states := persistently(look)) != {"finished"}:
    failed = sorted(state for state in states if state.startswith("failed"))
    # The processes around one that hangs fail too. A restart helps then, as it does when a worker is lost.
    if failed and not states & {"lost", f"failed {HUNG_EXIT_CODE}"}:
      # While a slice is being preempted, its workers fail before its state changes.
      time.sleep(args.poll_seconds)
      if persistently(target.state) == READY:
        raise LaunchError(
          f"watch: training {failed[0]}; see: tail {target.name}. The slice is still running and costs money"
        )
    elif states != {"running"}:
      if starts > target.job.max_restarts:
        raise LaunchError(f"watch: gave up after {target.job.max_restarts} restarts{target.leftover(target.seen())}")
      starts += 1
      print(f"{target.name}: start {starts}", file=sys.stderr, flush=True)
      persistently(lambda: resume(target, args))
    time.sleep(args.poll_seconds)
  print(f"{target.name}: finished", flush=True)
  if args.delete:
    persistently(target.delete)
  else:
    print("the slice is still running and is being billed: delete it", file=sys.stderr)
