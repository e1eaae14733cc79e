"""A training job, described once for every engine, and the flags that describe it."""

import argparse
from collections.abc import Callable, Sequence
import dataclasses
import os
from pathlib import Path
import re
import sys
from typing import Any

from launch import slices
from launch.commands import LaunchError

# The repository, of which the far side has a copy.
ROOT = Path(__file__).resolve().parents[1]
BUCKET_FOLDER = "/mnt/bucket"
# Exit code of a run that saved on SIGTERM. XPK restarts on 127 to 255; JobSet and SkyPilot are configured for this one.
PREEMPTED_EXIT_CODE = 143
# Of a run whose watchdog ended it, see `uae_jax.training.watchdog`.
HUNG_EXIT_CODE = 175
# Time from SIGTERM to SIGKILL: the run finishes its step, at most some minutes, and saves.
GRACE_SECONDS = 300
OF_THE_POOL = "in GKE the node pool has it: gcloud container node-pools create --flex-start --max-run-duration=10h"
SECRET_NAMES = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|KEY|CREDENTIALS?)$")


@dataclasses.dataclass(frozen=True)
class Job:
  """What every engine needs to know; the fields are also the flags of the command line.

  Attributes:
    name: of the job and of what is created for it; Google's rule for names.
    zone: Google Cloud zone; None: gcloud's own setting.
    project: Google Cloud project; None: gcloud's own setting.
    slice: one slice.
    num_slices: number of equal slices, connected by the data center's network.
    spot: cheaper capacity that may be taken away at any time.
    flex_start: capacity that starts when there is some, for at most `max_run_duration`.
    reservation: name of a reservation to take the capacity from.
    max_run_duration: of flex-start, such as "10h".
    image: container image, for engines that run containers.
    bucket: Cloud Storage bucket, mounted at BUCKET_FOLDER.
    train: flags of `uae-jax train`.
    env: (NAME, VALUE); VALUE is None if it comes from the local environment, and is then never printed.
    secrets: (NAME, reference), see `secret`.
    max_restarts: after failures; preemptions do not count.
    grace_seconds: from SIGTERM to SIGKILL.
  """

  name: str
  zone: str | None = None
  project: str | None = None
  slice: slices.Slice | None = None
  num_slices: int = 1
  spot: bool = False
  flex_start: bool = False
  reservation: str | None = None
  max_run_duration: str | None = None
  image: str | None = None
  bucket: str | None = None
  train: tuple[str, ...] = ()
  env: tuple[tuple[str, str | None], ...] = ()
  secrets: tuple[tuple[str, str], ...] = ()
  max_restarts: int = 20
  grace_seconds: int = GRACE_SECONDS

  @property
  def shape(self) -> slices.Slice:
    assert self.slice is not None  # every command that asks for it requires --topology
    return self.slice

  @property
  def command(self) -> list[str]:
    """The program and its arguments, on every host."""
    return ["uae-jax", "train", *self.train, f"--preempted_exit_code={PREEMPTED_EXIT_CODE}"]

  @property
  def literal_env(self) -> dict[str, str]:
    """The environment that may be shown."""
    cache = {"JAX_COMPILATION_CACHE_DIR": f"{BUCKET_FOLDER}/compilation_cache"} if self.bucket else {}
    return cache | {name: value for name, value in self.env if value is not None}

  @property
  def local_env_names(self) -> list[str]:
    return [name for name, value in self.env if value is None]

  def local_env(self) -> dict[str, str]:
    """The environment that comes from the local one and must not be shown.

    Raises:
      LaunchError: a variable is not set here.
    """
    if missing := [name for name in self.local_env_names if name not in os.environ]:
      raise LaunchError(f"--env={missing[0]}: {missing[0]} is not set in the local environment")
    return {name: os.environ[name] for name in self.local_env_names}


def matching(pattern: str, expected: str) -> Callable[[str], str]:
  """A type of argparse: text that matches as a whole, so that it can be neither an option nor shell syntax."""

  def convert(text: str) -> str:
    if re.fullmatch(pattern, text) is None:
      raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")
    return text

  return convert


name = matching(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", "at most 63 of a-z, 0-9 and -, from a letter to a letter or digit")
bucket = matching(r"[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9]", "the name of a bucket, without gs://")
zone = matching(r"[a-z]+-[a-z]+\d+-[a-z][a-z0-9]*", "a zone such as us-west4-a")
project = matching(r"[a-z][-a-z0-9.:]*", "the id of a project: a-z, 0-9 and -")
resource = matching(r"[A-Za-z0-9][-\w./]*", "letters, digits, -, _, . and /")
image = matching(r"[a-z0-9][-\w./:]*(@sha256:[0-9a-f]{64})?", "an image such as us-docker.pkg.dev/p/r/uae-jax:v1")
duration = matching(r"\d+[smhd]", "a duration such as 10h")
revision = matching(r"[A-Za-z0-9][\w./@^~{}-]*", "a branch, tag or commit")
repository = matching(r"[A-Za-z0-9/.~][^\s\0]*", "the URL of a repository")


def checked_slice(text: str) -> slices.Slice:
  try:
    return slices.parse(text)
  except ValueError as error:
    raise argparse.ArgumentTypeError(str(error)) from error


def count(text: str) -> int:
  """A number from 1."""
  return natural(text, 1)


def natural(text: str, lowest: int = 0) -> int:
  """A number from 0."""
  if re.fullmatch(r"\d{1,9}", text, re.ASCII) is None or int(text) < lowest:
    raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from {lowest}")
  return int(text)


def seconds(text: str) -> float:
  if re.fullmatch(r"\d{1,9}(\.\d+)?", text, re.ASCII) is None:
    raise argparse.ArgumentTypeError(f"{text!r}: expected seconds, such as 30 or 0.5")
  return float(text)


def variable(text: str) -> tuple[str, str | None]:
  """NAME=VALUE, or NAME for the value that it has in the local environment."""
  variable_name, equals, value = text.partition("=")
  if re.fullmatch(r"[A-Za-z_]\w*", variable_name, re.ASCII) is None:
    raise argparse.ArgumentTypeError("expected NAME=VALUE, or NAME alone for the value of the local environment")
  return variable_name, value if equals else None


def secret(text: str) -> tuple[str, str]:
  """NAME=REFERENCE: a secret of Secret Manager, or `k8s:SECRET/KEY`, a key of a Kubernetes secret."""
  match = re.fullmatch(
    r"([A-Za-z_]\w*)=(?:(projects/[-a-z0-9.:]+/secrets/[-\w]+)(/versions/\w+)?|(k8s:[-a-z0-9.]+/[-\w.]+))",
    text,
    re.ASCII,
  )
  if match is None:  # the text may be the secret itself: it is not repeated
    raise argparse.ArgumentTypeError(
      "expected a reference, NAME=projects/PROJECT/secrets/SECRET or NAME=k8s:SECRET/KEY, not the secret itself"
    )
  return match[1], match[4] or match[2] + (match[3] or "/versions/latest")


class Parser(argparse.ArgumentParser):
  """An argument parser with one-line errors and without abbreviations."""

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs | {"allow_abbrev": False})

  def error(self, message: str):
    self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def add_place(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("name", type=name, help="name of the job and of what is created for it")
  parser.add_argument("--zone", type=zone, help="default: gcloud's own setting")
  parser.add_argument("--project", type=project, help="default: gcloud's own setting")
  parser.add_argument("--dry-run", action="store_true", help="print what would be run or applied, and do nothing")


def add_capacity(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    *("--topology", "--accelerator-type"),
    dest="slice",
    type=checked_slice,
    required=True,
    metavar="SLICE",
    help="one slice, such as v5e:4x4 or v5litepod-16",
  )
  parser.add_argument("--slices", dest="num_slices", type=count, default=1, metavar="N", help="number of such slices")
  kind = parser.add_mutually_exclusive_group()
  kind.add_argument("--spot", action="store_true", help="cheaper, may be taken away at any time")
  kind.add_argument("--flex-start", action="store_true", help="starts when there is capacity, ends after a time")
  kind.add_argument("--reservation", type=resource, metavar="NAME", help="take the capacity from a reservation")
  parser.add_argument("--max-run-duration", type=duration, metavar="TIME", help="of --flex-start, such as 10h")


def add_bucket(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--bucket", type=bucket, help=f"bucket to mount at {BUCKET_FOLDER}; default: that of --workdir=gs://BUCKET/..."
  )


def add_training(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--config", metavar="FILE", help="config of the run; may also stand after --")
  parser.add_argument("--workdir", metavar="DIR", help="workdir of the run; may also stand after --")
  parser.add_argument(
    "--env",
    action="append",
    default=[],
    type=variable,
    metavar="NAME[=VALUE]",
    help="variable of the run; without VALUE that of the local environment, which is never printed",
  )
  parser.add_argument(
    "--secret",
    dest="secrets",
    action="append",
    default=[],
    type=secret,
    metavar="NAME=REF",
    help="variable of the run from projects/PROJECT/secrets/SECRET, or in GKE from k8s:SECRET/KEY",
  )


def add_container(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("--image", type=image, required=True, help="see: python -m launch.image")
  parser.add_argument("--max-restarts", type=natural, default=20, help="after failures")
  parser.add_argument(
    "--grace-seconds", type=count, default=GRACE_SECONDS, help="from SIGTERM to SIGKILL; the run saves"
  )


def training_flags(parser: argparse.ArgumentParser, args: argparse.Namespace, words: Sequence[str]) -> list[str]:
  """The flags of `uae-jax train`, with the paths that they have on the far side; sets `args.bucket`.

  Args:
    parser: reports what is wrong.
    args: flags before `--`.
    words: what follows `--`.
  """
  fields = ("config", "workdir")
  rest = [f"--{field}={getattr(args, field)}" for field in fields if getattr(args, field)] + list(words)
  flags: list[str] = []
  while rest:
    word = rest.pop(0)
    # `--workdir DIR` is `--workdir=DIR`.
    flags.append(f"{word}={rest.pop(0)}" if word in ("--config", "--workdir") and rest else word)
  for field in fields:
    given = sum(word.startswith(f"--{field}=") for word in flags)
    if not given:
      parser.error(f"{args.command} needs the flags of uae-jax train: --config=FILE --workdir=DIR")
    if given > 1:
      parser.error(f"--{field} is given {given} times: give it either before or after --")
  if match := re.fullmatch(r"gs://([^/]*)(/.*)?", value_of(flags, "workdir"), re.DOTALL):
    if getattr(args, "bucket", None) not in (None, match[1]):
      parser.error(f"--workdir is in the bucket {match[1]}, but --bucket says {args.bucket}")
    try:
      args.bucket = bucket(match[1])
    except argparse.ArgumentTypeError as error:
      parser.error(f"--workdir: {error}")
  if getattr(args, "bucket", None):
    # uae-jax reads and writes files: those of the bucket are in the folder at which it is mounted.
    flags = [re.sub(rf"gs://{re.escape(args.bucket)}(?=/|$)", BUCKET_FOLDER, word) for word in flags]
  return flags


def value_of(flags: Sequence[str], field: str) -> str:
  """The value of --config or --workdir."""
  return next(word.partition("=")[2] for word in flags if word.startswith(f"--{field}="))


def no_bucket(job: Job) -> str | None:
  """What is wrong with a workdir in the bucket's folder if no bucket is mounted there."""
  if job.train and not job.bucket and f"{value_of(job.train, 'workdir')}/".startswith(f"{BUCKET_FOLDER}/"):
    return f"--workdir={value_of(job.train, 'workdir')}: no bucket is mounted there: give --bucket=NAME, or --workdir=gs://NAME/..."
  return None


def warn_of_loss(job: Job) -> None:
  """Says that a workdir outside of the bucket is lost with the machine."""
  if not f"{value_of(job.train, 'workdir')}/".startswith(f"{BUCKET_FOLDER}/"):
    print(f"note: only what is under {BUCKET_FOLDER} outlives the slice, put --workdir there", file=sys.stderr)


def warn_of_config(job: Job) -> None:
  """Says that a config is not in the repository: the job would start on a slice that is paid for, and fail."""
  file = value_of(job.train, "config").partition(":")[0]
  if not os.path.isabs(file) and not (ROOT / file).exists():
    print(f"note: there is no {file} in {ROOT}: the run fails unless its code has it", file=sys.stderr)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, Job]:
  """Parses a command line; what follows `--` is for `uae-jax train`."""
  argv = list(argv)
  cut = argv.index("--") if "--" in argv else len(argv)
  args = parser.parse_args(argv[:cut])
  words = argv[cut + 1 :]
  takes_flags = hasattr(args, "config")
  if words and not takes_flags:
    parser.error(f"{args.command} takes nothing after --")
  if "--dry-run" in words:
    parser.error("--dry-run belongs before --: what follows -- is for uae-jax train")
  if takes_flags:
    words = training_flags(parser, args, words)
  if getattr(args, "max_run_duration", None) and not args.flex_start:
    parser.error("--max-run-duration is for --flex-start")
  known = {field.name for field in dataclasses.fields(Job)} & vars(args).keys()
  given: dict[str, Any] = {field: getattr(args, field) for field in known} | {"train": words}
  names = [variable_name for variable_name, _ in (*given.get("env", ()), *given.get("secrets", ()))]
  if repeated := next((text for text in names if names.count(text) > 1), None):
    parser.error(f"--env and --secret give {repeated} twice")
  fixed: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
  return args, Job(**fixed)


def refuse_literal_secrets(job: Job) -> None:
  """Refuses literal values of variables that sound secret, for engines whose manifests everybody can read.

  Raises:
    LaunchError: there is one.
  """
  if found := [name for name, value in job.env if value is not None and SECRET_NAMES.search(name.upper())]:
    raise LaunchError(
      f"--env={found[0]}: a secret does not belong on a command line or in a manifest; "
      f"give a reference, --secret={found[0]}=..., or --env={found[0]} for the value of the local environment"
    )


def no_kubernetes(job: Job) -> str | None:
  """What is wrong with the secrets of a job that does not read those of Kubernetes."""
  reference = next((reference for _, reference in job.secrets if reference.startswith("k8s:")), None)
  return reference and f"--secret: {reference} is for launch.jobset; here give projects/PROJECT/secrets/SECRET"


def reported(program: str, execute: Callable[[], object], on_interrupt: str) -> int:
  """Runs a command and returns its exit code: 0, 1 after an error in one line, 130 when interrupted."""
  try:
    execute()
  except LaunchError as error:
    print(f"{program}: error: {error}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print(f"{program}: interrupted; {on_interrupt}", file=sys.stderr)
    return 130
  return 0


def main(
  parser: argparse.ArgumentParser,
  argv: Sequence[str] | None,
  check: Callable[[argparse.Namespace, Job], str | None],
  execute: Callable[[argparse.Namespace, Job], None],
  on_interrupt: str,
) -> int:
  """The command line of an engine.

  Args:
    parser: its commands and flags.
    argv: arguments; None: of this process.
    check: what is wrong with the flags, found before anything runs; None if nothing is.
    execute: runs the command.
    on_interrupt: what may be left when the user interrupts.
  """
  args, job = parse(parser, sys.argv[1:] if argv is None else argv)
  if problem := check(args, job):
    parser.error(problem)
  if job.train:
    warn_of_config(job)
  return reported(parser.prog, lambda: execute(args, job), on_interrupt)
