"""Shared by the commands: an argument parser with one-line errors, types of arguments, and error reporting.

Nothing heavy is imported here, so that `uae-jax <command> --help` answers in well under a second.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
import contextlib
import logging
import math
from pathlib import Path
import signal
import sys
import threading
import traceback
from typing import Any
import warnings

from uae_jax import cloud_storage, files

# Epilog of commands that write to a folder or file.
PROCESSES = """
The same command goes on where a killed one stopped. Several processes share the work as those of `uae-jax train` do:
run the same command in each of them, with an --out that all of them can access. See docs/evaluation.md.
"""
# Longer messages are cut; those of libraries may have hundreds of lines.
LONGEST_ERROR = 2000


class Parser(argparse.ArgumentParser):
  """Argument parser of `uae-jax <command>`."""

  def __init__(self, command: str, description: str, epilog: str = ""):
    super().__init__(
      prog=f"uae-jax {command}",
      description=description,
      epilog=epilog,
      allow_abbrev=False,
    )
    # `cli.main` handles --verbose for every command; it is declared here for the help text and for direct calls.
    self.add_argument(
      "--verbose", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )

  def parse_known_args(self, args=None, namespace=None):
    """Refuses an option that is given twice, of which argparse would use the last one."""
    for action in self._actions:
      count = sum(text.partition("=")[0] in action.option_strings for text in args or ())
      if count > 1 and not isinstance(action, argparse._AppendAction | argparse._StoreTrueAction):
        self.error(f"{action.option_strings[-1]} is given {count} times")
    return super().parse_known_args(args, namespace)

  def refuse_unused(self, arguments: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Refuses options that this call would ignore.

    Args:
      arguments: parsed arguments.
      names: attributes of `arguments`; one that has its default was not given.
      why: end of the message, such as "goes with --to peft".
    """
    for name in names:
      if getattr(arguments, name) != self.get_default(name):
        self.error(f"--{name.replace('_', '-')} {why}")

  def error(self, message: str):
    """Prints a one-line error in place of argparse's usage and error, and exits with 2."""
    self.exit(2, f"{self.prog}: error: {files.shown(message)} (see {self.prog} --help)\n")


def not_empty(text: str) -> str:
  """The type of an argument that is a text; an empty one is what a shell makes of a variable that is not set."""
  if not text:
    raise argparse.ArgumentTypeError("it is empty")
  return text


def path(text: str) -> Path:
  """The type of an argument that is a path of this machine; see `files.local_path`."""
  text = not_empty(text)
  try:
    return Path(files.local_path(text))
  except ValueError as error:
    raise argparse.ArgumentTypeError(str(error)) from error


def input_path(text: str) -> Path:
  """The type of an argument that is only read, which may be in a bucket; see `cloud_storage.fetched`."""
  text = not_empty(text)
  try:
    return Path(cloud_storage.fetched(files.input_path(text)))
  except (ValueError, FileNotFoundError) as error:
    raise argparse.ArgumentTypeError(str(error)) from error


def output_path(text: str) -> Path:
  """The type of an argument that names a result, which may be in a bucket; see `cloud_storage.result`."""
  if not files.is_in_cloud(text):
    return path(text)
  try:
    return cloud_storage.result(text)
  except ValueError as error:
    raise argparse.ArgumentTypeError(str(error)) from error


def number(
  kind: type, *, at_least: float = -math.inf, more_than: float = -math.inf, at_most: float = math.inf
) -> Callable[[str], Any]:
  """The type of an argument that is a finite number within limits."""
  limits = {f"{at_least} or more": at_least, f"more than {more_than}": more_than, f"{at_most} or less": at_most}
  ends = [text for text, limit in limits.items() if math.isfinite(limit)]
  expected = ", ".join(["a whole number" if kind is int else "a number", *ends])

  def parse(text: str) -> Any:
    try:
      value = kind(text)
    except ValueError:
      value = math.nan
    if not (math.isfinite(value) and at_least <= value <= at_most and value > more_than):
      raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")
    return value

  return parse


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the options that connect the processes of a command; see `training.processes.join`."""
  parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
  parser.add_argument("--num_processes", type=number(int, at_least=1), metavar="N", help="number of processes")
  parser.add_argument("--process_id", type=number(int, at_least=0), metavar="I", help="index of this process, from 0")


def in_processes(arguments: argparse.Namespace, work: Callable[[], int]) -> int:
  """Connects this process to the others of the command and calls `work`, which ends or fails in all of them."""
  from uae_jax.training import processes

  processes.join(arguments.coordinator, arguments.num_processes, arguments.process_id)
  if cloud_storage.has_results() and processes.gather(None)[1:]:
    raise ValueError("--out=gs://... is for one process: name a folder of a mounted bucket, which all can access")
  with processes.together():
    return work()


def given(arguments: argparse.Namespace, *names: str) -> dict:
  """The named options that are set; the others keep the default of the function that receives them."""
  return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def say(path: Path) -> None:
  """Prints the path of a result on stdout."""
  print(files.shown(cloud_storage.shown(str(path))))


def one_line(error: BaseException) -> str:
  """An error's message as one line, prefixed with its type unless the user's input caused it."""
  message = " ".join(str(error).split())
  if isinstance(error, OSError) and error.strerror:
    message = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
  if len(message) > LONGEST_ERROR:
    message = f"{message[:LONGEST_ERROR]} ... (--verbose shows all of it)"
  if isinstance(error, (ValueError, OSError, argparse.ArgumentError)) and message:
    return files.shown(message)
  return files.shown(f"{type(error).__name__}: {message}" if message else type(error).__name__)


class Terminated(BaseException):
  """Raised by SIGTERM in `ended_by_sigterm`."""


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
  """Context in which SIGTERM raises `Terminated`, so that no half-written file is left; a second one ends at once."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def end(*_) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise Terminated

  before = signal.signal(signal.SIGTERM, end)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def one_line_messages(command: str) -> Iterator[None]:
  """Context in which warnings and log messages are one line each, without what libraries log about errors.

  Orbax logs the traceback of every failed array before it raises the error that the command reports.
  """
  handler = logging.StreamHandler()
  handler.addFilter(_is_news)
  handler.setFormatter(_OneLine(command))
  hooks = warnings.formatwarning, sys.unraisablehook, threading.excepthook
  warnings.formatwarning = lambda message, *_, **__: f"uae-jax {command}: warning: {' '.join(str(message).split())}\n"
  sys.unraisablehook = lambda _: None
  threading.excepthook = lambda _: None
  # Libraries add no handler of their own where the root logger has one.
  logging.getLogger().addHandler(handler)
  try:
    yield
  finally:
    logging.getLogger().removeHandler(handler)
    warnings.formatwarning, sys.unraisablehook, threading.excepthook = hooks


def _is_news(record: logging.LogRecord) -> bool:
  """Whether a log message adds something to the errors of the command."""
  return not record.exc_info and record.name != "asyncio" and "/orbax/" not in record.pathname


class _OneLine(logging.Formatter):
  """Formats `uae-jax COMMAND: warning: ...`."""

  def __init__(self, command: str):
    super().__init__()
    self._command = command

  def format(self, record: logging.LogRecord) -> str:
    return f"uae-jax {self._command}: {record.levelname.lower()}: {' '.join(record.getMessage().split())}"


def report_error(command: str, error: BaseException, verbose: bool) -> None:
  """Prints `uae-jax COMMAND: error: ...` to stderr, after the traceback if `verbose`."""
  if verbose:
    traceback.print_exception(error)
  print(f"uae-jax {command}: error: {cloud_storage.shown(one_line(error))}", file=sys.stderr, flush=True)
