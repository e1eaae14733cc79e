"""Manages Cloud TPU VMs from a terminal: create a slice, install, train on all workers, watch, resume, delete.

python -m launch.tpu_vm create mine --zone=us-west4-a --accelerator-type=v5litepod-16 --spot
python -m launch.tpu_vm setup  mine --zone=us-west4-a --bucket=my-bucket
python -m launch.tpu_vm start  mine --zone=us-west4-a -- --config=configs/scenes.py --workdir=/mnt/bucket/runs/one
python -m launch.tpu_vm delete mine --zone=us-west4-a

A thin wrapper of `gcloud compute tpus`: options have gcloud's names, and --dry-run prints the commands without running
them. docs/cloud_tpu.md walks through all steps from project to deletion.
"""

import argparse
from collections import deque
from collections.abc import Callable, Sequence
import dataclasses
import difflib
from pathlib import Path
import re
import shlex
import subprocess
import sys
import tempfile
import time

ROOT = Path(__file__).resolve().parents[1]
BUCKET_FOLDER = "/mnt/bucket"

# Prefix of an accelerator type -> (runtime version, sizes). Sizes count chips for v5e and v6e, cores for v4 and v5p.
# Source: cloud.google.com/tpu/docs/supported-tpu-configurations and .../docs/runtimes.
POWERS = (8, 16, 32, 64)
ACCELERATORS = {
  "v4": ("tpu-ubuntu2204-base", (*POWERS, *range(128, 4097, 128))),
  "v5litepod": ("v2-alpha-tpuv5-lite", (1, 4, *POWERS, 128, 256)),
  "v5p": ("v2-alpha-tpuv5", (*POWERS, *range(128, 12289, 128))),
  "v6e": ("v2-alpha-tpuv6e", (1, 4, *POWERS, 128, 256)),
}

# States of a node or of a queued resource. Any other state needs manual inspection.
READY = "READY"
ABSENT = "ABSENT"
LOST = ("PREEMPTED", "TERMINATED", "SUSPENDED", "FAILED")
CHANGING = (
  *("CREATING", "STARTING", "RESTARTING", "REIMAGING", "REPAIRING", "STOPPING", "DELETING", "UNHIDING"),
  *("ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "SUSPENDING"),
)

MAX_BACKOFF_SECONDS = 600.0
SSH_RETRIES = 2


@dataclasses.dataclass(frozen=True)
class Cause:
  """A cause of a gcloud failure: pattern of its message, advice, and whether retrying later may help."""

  pattern: str
  advice: str
  is_passing: bool = False


NOT_FOUND = Cause(r"NOT_FOUND|was not found", "check name, zone and project, and --queued if it was created with it")
TAKEN_AWAY = Cause(r"PREEMPTED|TERMINATED", "the slice was taken away", is_passing=True)
# The first match counts: a quota error also contains the code of a stock-out.
CAUSES = (
  Cause(
    r"quota.*(exceeded|limit)|exceeded.*quota",
    "the project's TPU quota is too small for it: ask for more, or take another zone or size",
  ),
  Cause(
    r"no more capacity|insufficient\b.*capacity|stock.?out|resource.?exhausted|\bcode\"?: 8\b",
    "the zone has none left: wait, use --queued, or take another zone",
    is_passing=True,
  ),
  Cause(r"auth login|active account|reauthenticat|invalid_grant", "run: gcloud auth login"),
  Cause(r"SERVICE_DISABLED|has not been used in project", "run: gcloud services enable tpu.googleapis.com"),
  Cause(r"PERMISSION_DENIED|does not have permission", "the account needs the role roles/tpu.admin in the project"),
  Cause(r"ALREADY_EXISTS|already exists", "choose another name, or delete it first"),
  NOT_FOUND,
  TAKEN_AWAY,
  Cause(r"key is not present in the SSH agent", "run: ssh-add ~/.ssh/google_compute_engine"),
  Cause(
    r"return code \[255\]|connection (refused|reset|closed|timed out)|UNAVAILABLE|exit code 255",
    "the connection was lost",
    is_passing=True,
  ),
)


class LaunchError(Exception):
  """A step failed; `is_passing` if retrying later may help."""

  def __init__(self, message: str, cause: Cause | None = None):
    super().__init__(message)
    self.cause = cause

  @property
  def is_passing(self) -> bool:
    return self.cause is not None and self.cause.is_passing


def run(step: str, command: Sequence[str], *, is_dry: bool, captures: bool = False) -> str:
  """Runs one command, or prints it in shell syntax.

  Args:
    step: name of the step for error messages.
    command: program and arguments.
    is_dry: print the command instead of running it.
    captures: return the command's stdout instead of showing it on the terminal.

  Raises:
    LaunchError: the command failed; contains the program's own message.
  """
  if is_dry:
    print(shlex.join(command), flush=True)
    return ""
  if not captures:
    print(f"+ {shlex.join(command)}", file=sys.stderr, flush=True)
  errors: deque[str] = deque(maxlen=200)
  with tempfile.TemporaryFile("w+") as output:
    try:
      process = subprocess.Popen(command, stdout=output if captures else None, stderr=subprocess.PIPE, text=True)
    except FileNotFoundError as error:
      where = ": install the Google Cloud CLI, cloud.google.com/sdk/docs/install" if command[0] == "gcloud" else ""
      raise LaunchError(f"{step}: {command[0]} is not on PATH{where}") from error
    with process:
      assert process.stderr is not None  # it is a pipe
      for line in process.stderr:
        errors.append(line)
        if not captures:
          sys.stderr.write(line)
    output.seek(0)
    text = output.read()
  if process.returncode:
    # A failure on one of many workers has no message of its own, only an exit code.
    said = f"{own_message(''.join(errors))} (exit code {process.returncode})"
    cause = next((cause for cause in CAUSES if re.search(cause.pattern, said, re.IGNORECASE)), None)
    advice = f": {cause.advice}" if cause else ""
    raise LaunchError(f"{step}: {said}{advice}", cause)
  return text


def own_message(said: str) -> str:
  """Extracts the error from a program's stderr as one line; without an error, the last line."""
  start = said.rfind("ERROR:")
  lines = said[start:].splitlines() if start >= 0 else said.strip().splitlines()[-1:]
  return " ".join(" ".join(lines).split())


def with_retries(function: Callable[[], object], *, retries: int, backoff_seconds: float):
  """Calls `function()`, with retries and exponential backoff after passing errors.

  Raises:
    LaunchError: an error is not passing, or all retries failed.
  """
  for attempt in range(retries + 1):
    try:
      return function()
    except LaunchError as error:
      if not error.is_passing or attempt == retries:
        raise
      seconds = min(backoff_seconds * 2**attempt, MAX_BACKOFF_SECONDS)
      print(f"{error}; again in {seconds:g} s ({attempt + 1} of {retries})", file=sys.stderr, flush=True)
      time.sleep(seconds)


@dataclasses.dataclass(frozen=True)
class Slice:
  """A named TPU slice; each method runs gcloud commands on it."""

  name: str
  zone: str | None
  project: str | None
  is_queued: bool
  is_dry: bool
  backoff_seconds: float
  batch_size: str | None
  is_internal: bool

  def gcloud(self, step: str, kind: str, verb: str, *flags: str, captures: bool = False) -> str:
    place = [f"--{key}={value}" for key, value in (("zone", self.zone), ("project", self.project)) if value]
    names = flags if verb == "scp" else (self.name, *flags)
    # Only the alpha commands support batches of workers (Google Cloud SDK 528).
    track = ["alpha"] if any(flag.startswith("--batch-size") for flag in flags) else []
    command = ["gcloud", *track, "compute", "tpus", kind, verb, *names, *place, "--quiet"]
    return run(step, command, is_dry=self.is_dry, captures=captures)

  def create(self, args: argparse.Namespace) -> None:
    version = args.runtime_version or ACCELERATORS[args.accelerator_type.rpartition("-")[0]][0]
    flags = [f"--accelerator-type={args.accelerator_type}"]
    flags += [f"--{'runtime-version' if self.is_queued else 'version'}={version}"]
    flags += ["--spot"] if args.spot else []
    flags += ["--internal-ips"] if self.is_internal else []
    flags += args.create_flag
    if self.is_queued:
      duration = [f"--valid-until-duration={args.valid_until_duration}"] if args.valid_until_duration else []
      self.gcloud("create", "queued-resources", "create", f"--node-id={self.name}", *flags, *duration)
    else:
      self.gcloud("create", "tpu-vm", "create", *flags)

  def delete(self, *, is_async: bool = False) -> None:
    # Without --force, gcloud does not delete a queued resource that has a node.
    flags = (["--force"] if self.is_queued else []) + (["--async"] if is_async else [])
    self.gcloud("delete", "queued-resources" if self.is_queued else "tpu-vm", "delete", *flags)

  def state(self) -> str:
    """State of the node, or of the queued resource while it is not active; ABSENT if there is none."""
    try:
      if self.is_queued:
        queued = self.gcloud("state", "queued-resources", "describe", "--format=value(state.state)", captures=True)
        if not self.is_dry and queued.strip() != "ACTIVE":
          return queued.strip()
      return self.gcloud("state", "tpu-vm", "describe", "--format=value(state)", captures=True).strip()
    except LaunchError as error:
      if error.cause is NOT_FOUND:
        return ABSENT
      raise

  def connection_flags(self, worker: str) -> list[str]:
    batch = [f"--batch-size={self.batch_size}"] if self.batch_size and worker == "all" else []
    return [f"--worker={worker}", *batch, *(["--internal-ip"] if self.is_internal else [])]

  def ssh(self, step: str, script: str, *, worker: str = "all", captures: bool = False) -> str:
    """Runs a script on one or all workers; the script must be idempotent because it may be retried."""
    flags = [*self.connection_flags(worker), f"--command={script}"]
    # A new slice takes a while to receive the SSH keys.
    return with_retries(
      lambda: self.gcloud(step, "tpu-vm", "ssh", *flags, captures=captures),
      retries=SSH_RETRIES,
      backoff_seconds=self.backoff_seconds,
    )

  def copy(self, step: str, file: Path) -> None:
    """Copies a file to the home folder of every worker."""
    flags = [str(file), f"{self.name}:{file.name}", *self.connection_flags("all")]
    with_retries(
      lambda: self.gcloud(step, "tpu-vm", "scp", *flags), retries=SSH_RETRIES, backoff_seconds=self.backoff_seconds
    )


# Scripts that run on the workers. The code is in ~/uae_jax, its packages in ~/uae_venv, and a run's pid, log and exit
# code in ~/uae_run.
IS_RUNNING = """r=$HOME/uae_run
is_running() { [ -f $r/pid ] && [ ! -f $r/exit_code ] && kill -0 "$(cat $r/pid)" 2>/dev/null; }
"""

UNPACK = """rm -rf ~/uae_jax
mkdir ~/uae_jax
tar -xzf ~/{archive} -C ~/uae_jax
"""

CLONE = """git init --quiet ~/uae_jax
git -C ~/uae_jax fetch --quiet --depth=1 {repository} {ref}
git -C ~/uae_jax checkout --quiet --force --detach FETCH_HEAD
"""

# The image's Python is too old for the package; uv installs its own.
INSTALL = """export PATH="$HOME/.local/bin:$PATH"
command -v uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
[ -x ~/uae_venv/bin/python ] || uv venv --quiet --python=3.12 ~/uae_venv
uv pip install --quiet --python="$HOME/uae_venv/bin/python" --editable="$HOME/uae_jax[tpu]"
"""

MOUNT = """if ! mountpoint -q {folder}; then
  if ! command -v gcsfuse > /dev/null; then
    key=/usr/share/keyrings/cloud.google.asc
    curl -LsSf https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee $key > /dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" \\
      | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
    sudo apt-get -o DPkg::Lock::Timeout=300 -qq update
    sudo apt-get -o DPkg::Lock::Timeout=300 -qq install -y gcsfuse
  fi
  sudo mkdir -p {folder}
  sudo chown "$USER" {folder}
  gcsfuse --implicit-dirs {bucket} {folder}
fi
"""

# Runs in its own session, so that it outlives ssh and signals also reach its data workers. The surrounding shell
# ignores SIGTERM, in order to write the exit code.
START = """if is_running; then echo "$(hostname): already running"; exit 0; fi
mkdir -p $r
rm -f $r/exit_code
if [ -f $r/log ]; then mv $r/log $r/log.$(date +%Y%m%d-%H%M%S); fi
cd ~/uae_jax
nohup setsid bash -c 'trap : TERM; "$@"; echo $? > ~/uae_run/exit_code' run \\
  {env} ~/uae_venv/bin/uae-jax train {flags} > $r/log 2>&1 < /dev/null &
echo $! > $r/pid
echo "$(hostname): started"
"""

STOP = """if ! is_running; then echo "$(hostname): nothing is running"; exit 0; fi
kill -TERM -- "-$(cat $r/pid)"
for _ in $(seq {seconds}); do
  if ! is_running; then echo "$(hostname): stopped"; exit 0; fi
  sleep 1
done
kill -KILL -- "-$(cat $r/pid)"
echo "$(hostname): killed, it did not end within {seconds} s"
"""

# `uae-jax train` exits with 0 both when finished and when preempted; its last line then starts with "preempted,".
STATUS = """if is_running; then s=running
elif [ ! -f $r/pid ]; then s=none
elif [ ! -f $r/exit_code ]; then s=lost
elif [ "$(cat $r/exit_code)" != 0 ]; then s="failed $(cat $r/exit_code)"
elif tail -n 20 $r/log | grep -q '^preempted,'; then s=preempted
else s=finished; fi
echo "uae-run $(hostname) $s"
"""


def setup(target: Slice, args: argparse.Namespace) -> None:
  """Installs code and packages on every worker and mounts the bucket. May be repeated."""
  if args.repository:
    code = CLONE.format(repository=shlex.quote(args.repository), ref=shlex.quote(args.ref))
  else:
    archive = ROOT / "build" / f"{target.name}.tar.gz"
    if not target.is_dry:
      archive.parent.mkdir(exist_ok=True)
    git = ["git", "-C", str(ROOT)]
    if run("setup", [*git, "status", "--porcelain"], is_dry=target.is_dry, captures=True):
      print(f"note: uncommitted changes are not copied, only {args.ref}", file=sys.stderr)
    run("setup", [*git, "archive", "--format=tar.gz", f"--output={archive}", args.ref], is_dry=target.is_dry)
    target.copy("setup", archive)
    code = UNPACK.format(archive=archive.name)
  mount = MOUNT.format(bucket=shlex.quote(args.bucket), folder=BUCKET_FOLDER) if args.bucket else ""
  busy = 'if is_running; then echo "ERROR: $(hostname): a run is going on, stop it first" >&2; exit 3; fi\n'
  target.ssh("setup", "set -eo pipefail\n" + IS_RUNNING + busy + code + INSTALL + mount)


def start(target: Slice, args: argparse.Namespace) -> None:
  """Starts `uae-jax train` detached on every worker on which it is not running."""
  script = START.format(env=shlex.join(["env", *args.env]), flags=shlex.join(args.train))
  target.ssh("start", "set -e\n" + IS_RUNNING + script)


def stop(target: Slice, seconds: int) -> None:
  """Sends SIGTERM, on which the run saves and exits; sends SIGKILL after `seconds`."""
  target.ssh("stop", IS_RUNNING + STOP.format(seconds=seconds))


def worker_states(target: Slice) -> dict[str, str]:
  """Host -> state of its run: running, none, lost, preempted, finished or `failed <exit code>`."""
  lines = target.ssh("status", IS_RUNNING + STATUS, captures=True).splitlines()
  return {line.split()[1]: " ".join(line.split()[2:]) for line in lines if line.startswith("uae-run ")}


def status(target: Slice) -> None:
  """Prints the state of the slice and, if it is ready, of the run on every worker."""
  state = target.state()
  if target.is_dry:
    worker_states(target)
    return
  print(f"{target.name}: {state}")
  if state == READY:
    for host, run_state in sorted(worker_states(target).items()):
      print(f"  {host}: {run_state}")


def resume(target: Slice, args: argparse.Namespace) -> None:
  """Brings the slice up, recreating it if it was preempted, and starts the run on all workers.

  Raises:
    LaunchError: a step failed, or the new slice was preempted immediately.
  """
  if target.is_dry:
    print(f"# as if {target.name} had been preempted")
    target.state()
    target.delete()
    target.create(args)
  is_created = False
  while not target.is_dry and (state := target.state()) != READY:
    if state in (*LOST, ABSENT):
      if is_created:
        raise LaunchError(f"create: {target.name} is {state} after it was created", TAKEN_AWAY)
      if state in LOST:
        target.delete()
      target.create(args)
      is_created = True
    elif state in CHANGING:
      time.sleep(args.poll_seconds)
    else:
      raise LaunchError(f"resume: {target.name} is {state}: bring it to {READY}, or delete it")
  # A slice can lose a single worker: the run on the others is stopped, because it would wait for that worker.
  stop(target, args.grace_seconds)
  setup(target, args)
  start(target, args)


def watch(target: Slice, args: argparse.Namespace) -> None:
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
    if failed and "lost" not in states:
      # While a slice is being preempted, its workers fail before its state changes.
      time.sleep(args.poll_seconds)
      if persistently(target.state) == READY:
        raise LaunchError(
          f"watch: training {failed[0]}; see: tail {target.name}. The slice is still running and costs money"
        )
    elif states != {"running"}:
      if starts > args.max_restarts:
        raise LaunchError(
          f"watch: gave up after {args.max_restarts} restarts, the slice may still be running and cost money"
        )
      starts += 1
      print(f"{target.name}: start {starts}", file=sys.stderr, flush=True)
      persistently(lambda: resume(target, args))
    time.sleep(args.poll_seconds)
  print(f"{target.name}: finished", flush=True)
  if args.delete:
    persistently(target.delete)
  else:
    print("the slice is still running and is being billed: delete it", file=sys.stderr)


def accelerator_type(text: str) -> str:
  """Validates an accelerator type such as `v5litepod-16`."""
  prefix, _, size = text.rpartition("-")
  if prefix in ACCELERATORS and size.isdigit() and int(size) in ACCELERATORS[prefix][1]:
    return text
  if prefix in ACCELERATORS:
    sizes = ", ".join(map(str, ACCELERATORS[prefix][1][:8]))
    raise argparse.ArgumentTypeError(f"{prefix} does not come in size {size!r}, but in {sizes}, ...")
  near = difflib.get_close_matches(prefix or text, ACCELERATORS, n=1)
  hint = f", did you mean {near[0]}-{size}?" if near else ""
  known = ", ".join(f"{name}-8" for name in ACCELERATORS)
  raise argparse.ArgumentTypeError(f"unknown accelerator {text!r}{hint}: expected {known}, or another size of these")


class Parser(argparse.ArgumentParser):
  """An argument parser with one-line errors."""

  def error(self, message: str):
    self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
  common, creation, code, training, patience = (Parser(add_help=False, allow_abbrev=False) for _ in range(5))
  common.add_argument("name", help="name of the slice")
  common.add_argument("--zone", help="default: gcloud's own setting")
  common.add_argument("--project", help="default: gcloud's own setting")
  common.add_argument("--queued", action="store_true", help="the slice is a queued resource of this name with one node")
  common.add_argument("--batch-size", help="workers per ssh batch (default: all); needs gcloud alpha")
  common.add_argument("--internal-ip", action="store_true", help="the workers have internal addresses only")
  common.add_argument("--backoff-seconds", type=float, default=30.0, help="wait before the first retry; doubles")
  common.add_argument("--dry-run", action="store_true", help="print the commands without running them")

  creation.add_argument("--accelerator-type", type=accelerator_type, required=True, metavar="TYPE")
  creation.add_argument("--runtime-version", help="default: depends on the accelerator type")
  creation.add_argument("--spot", action="store_true", help="cheaper, may be preempted at any time")
  creation.add_argument(
    "--valid-until-duration", metavar="DURATION", help="give up queueing after this time, such as 6h"
  )
  creation.add_argument(
    "--create-flag", action="append", default=[], metavar="FLAG", help="extra flag for gcloud's create"
  )

  code.add_argument("--ref", default="HEAD", help="commit to install (default: HEAD)")
  code.add_argument("--repository", help="URL to clone on the workers; default: copy the local repository")
  code.add_argument("--bucket", help=f"Cloud Storage bucket to mount at {BUCKET_FOLDER}; workdirs belong there")

  training.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="environment of the run")

  patience.add_argument("--poll-seconds", type=float, default=60.0)
  patience.add_argument(
    "--max-retries", type=int, default=10, help="consecutive retries of passing errors: stock-outs, ssh"
  )
  patience.add_argument("--grace-seconds", type=int, default=60, help="time from SIGTERM to SIGKILL")

  top = Parser(prog="tpu_vm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  commands = top.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")

  def add(name, summary, *parents):
    return commands.add_parser(name, help=summary, description=summary, parents=[common, *parents], allow_abbrev=False)

  add("create", "create a slice, or queue for one", creation).add_argument("--max-retries", type=int, default=0)
  add("setup", "install code and packages on every worker", code)
  add("start", "start `uae-jax train` on every worker; its flags follow --", training)
  tail = add("tail", "show the log of a worker")
  tail.add_argument("--worker", default="0")
  tail.add_argument("--lines", type=int, default=50)
  tail.add_argument("--follow", action="store_true")
  add("status", "state of the slice and of the run on every worker")
  add("resume", "bring the slice up, recreating it if it was preempted, and start", creation, code, training, patience)
  watcher = add("watch", "resume whenever it is preempted, until finished", creation, code, training, patience)
  watcher.add_argument("--max-restarts", type=int, default=20)
  watcher.add_argument("--delete", action="store_true", help="delete the slice once training has finished")
  add("stop", "save and end the run; the slice keeps running").add_argument("--grace-seconds", type=int, default=60)
  add("delete", "delete the slice").add_argument("--async", action="store_true", dest="is_async")
  return top


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """Parses our options; those after `--` are for `uae-jax train`."""
  argv = list(argv)
  cut = argv.index("--") if "--" in argv else len(argv)
  top = parser()
  args = top.parse_args(argv[:cut])
  args.train = argv[cut + 1 :]
  takes_flags = args.command in ("start", "resume", "watch")
  if takes_flags and not args.train:
    top.error(f"{args.command} needs the flags of uae-jax train after --, such as -- --config=FILE --workdir=DIR")
  if "--dry-run" in args.train:
    top.error("--dry-run belongs before --: what follows -- is for uae-jax train")
  if args.train and not takes_flags:
    top.error(f"{args.command} takes nothing after --")
  if getattr(args, "valid_until_duration", None) and not args.queued:
    top.error("--valid-until-duration is for --queued")
  if wrong := next((item for item in getattr(args, "env", []) if not re.match(r"[A-Za-z_]\w*=", item)), None):
    top.error(f"--env={wrong}: expected NAME=VALUE")
  return args


def execute(args: argparse.Namespace) -> None:
  target = Slice(
    name=args.name,
    zone=args.zone,
    project=args.project,
    is_queued=args.queued,
    is_dry=args.dry_run,
    backoff_seconds=args.backoff_seconds,
    batch_size=args.batch_size,
    is_internal=args.internal_ip,
  )
  if args.command in ("resume", "watch") and not any(BUCKET_FOLDER in word for word in args.train):
    print(f"note: only what is under {BUCKET_FOLDER} outlives the slice, put --workdir there", file=sys.stderr)
  if args.command == "create":
    with_retries(lambda: target.create(args), retries=args.max_retries, backoff_seconds=args.backoff_seconds)
  elif args.command == "setup":
    setup(target, args)
  elif args.command == "start":
    start(target, args)
  elif args.command == "tail":
    follow = " -F" if args.follow else ""
    target.ssh("tail", f"tail -n {args.lines}{follow} ~/uae_run/log", worker=args.worker)
  elif args.command == "status":
    status(target)
  elif args.command == "resume":
    with_retries(lambda: resume(target, args), retries=args.max_retries, backoff_seconds=args.backoff_seconds)
  elif args.command == "watch":
    watch(target, args)
  elif args.command == "stop":
    stop(target, args.grace_seconds)
  else:
    target.delete(is_async=args.is_async)


def main(argv: Sequence[str] | None = None) -> int:
  args = parse(sys.argv[1:] if argv is None else argv)
  try:
    execute(args)
  except LaunchError as error:
    print(f"tpu_vm: error: {error}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print("tpu_vm: interrupted; the slice keeps running and is being billed", file=sys.stderr)
    return 130
  return 0


if __name__ == "__main__":
  sys.exit(main())
