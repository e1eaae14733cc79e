"""Runs the programs of the launchers: prints them or executes them, explains their errors, retries passing ones."""

from collections import deque
from collections.abc import Callable, Sequence
import dataclasses
import re
import shlex
import subprocess
import sys
import tempfile
import time

MAX_BACKOFF_SECONDS = 600.0
INSTALL = {
  "gcloud": "install the Google Cloud CLI, cloud.google.com/sdk/docs/install",
  "kubectl": "run: gcloud components install kubectl",
  "xpk": "run: pip install xpk",
  "sky": "run: pip install 'skypilot[gcp]'",
  "docker": "install Docker, docs.docker.com/engine/install",
}


@dataclasses.dataclass(frozen=True)
class Cause:
  """A cause of a failure: pattern of its message, advice, and whether retrying later may help."""

  pattern: str
  advice: str
  is_passing: bool = False


NOT_FOUND = Cause(r"NOT_?FOUND|was not found", "check name, zone and project, and --queued if it was created with it")
EXISTS = Cause(r"ALREADY_?EXISTS|already exists", "choose another name, or delete it first")
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
  Cause(
    r"no matches for kind \"JobSet\"|doesn't have a resource type \"jobset",
    "the cluster has no JobSet controller: install it, see docs/launch/gke.md",
  ),
  Cause(r"is forbidden: User", "the account may not do this in the cluster: it needs roles/container.developer"),
  Cause(r"PERMISSION_DENIED|does not have permission", "the account needs the role roles/tpu.admin in the project"),
  EXISTS,
  NOT_FOUND,
  TAKEN_AWAY,
  Cause(r"key is not present in the SSH agent", "run: ssh-add ~/.ssh/google_compute_engine"),
  Cause(
    r"return code \[255\]|connection (to the server \S+ was )?(refused|reset|closed|timed out)|i/o timeout|UNAVAILABLE|"
    r"exit code 255",
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


def run(step: str, command: Sequence[str], *, is_dry: bool, captures: bool = False, stdin: str | None = None) -> str:
  """Runs one command, or prints it in shell syntax. A secret belongs in a file or in stdin, never in the command.

  Args:
    step: name of the step for error messages.
    command: program and arguments.
    is_dry: print the command, with its stdin, instead of running it.
    captures: return the command's stdout instead of showing it on the terminal.
    stdin: text for the command's stdin; None: that of this process.

  Raises:
    LaunchError: the command failed; contains the program's own message.
  """
  if is_dry:
    print(shlex.join(command) + ("" if stdin is None else f" <<'END'\n{stdin}END"), flush=True)
    return ""
  if not captures:
    print(f"+ {shlex.join(command)}", file=sys.stderr, flush=True)
  errors: deque[str] = deque(maxlen=200)
  with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as text_in:
    text_in.write(stdin or "")
    text_in.seek(0)
    try:
      process = subprocess.Popen(
        command,
        stdin=None if stdin is None else text_in,
        stdout=output if captures else None,
        stderr=subprocess.PIPE,
        text=True,
      )
    except FileNotFoundError as error:
      remedy = f": {INSTALL[command[0]]}" if command[0] in INSTALL else ""
      raise LaunchError(f"{step}: {command[0]} is not on PATH{remedy}") from error
    with process:
      assert process.stderr is not None  # it is a pipe
      for line in process.stderr:
        errors.append(line)
        if not captures:
          sys.stderr.write(line)
    output.seek(0)
    text = output.read()
  if process.returncode:
    # A failure on one of many workers has no message of its own, only an exit code; XPK writes its own to stdout.
    said = f"{own_message(''.join(errors) or text)} (exit code {process.returncode})"
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
