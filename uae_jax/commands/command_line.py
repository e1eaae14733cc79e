"""Shared by the commands: an argument parser with one-line errors, and error reporting.

Nothing heavy is imported here, so that `uae-jax <command> --help` answers in well under a second.
"""

import argparse
import sys
import traceback


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

  def error(self, message: str):
    """Prints a one-line error in place of argparse's usage and error, and exits with 2."""
    self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def given(arguments: argparse.Namespace, *names: str) -> dict:
  """The named options that are set; the others keep the default of the function that receives them."""
  return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def one_line(error: BaseException) -> str:
  """An error's message as one line, prefixed with its type unless the user's input caused it."""
  message = " ".join(str(error).split())
  if isinstance(error, OSError) and error.filename is not None and error.strerror:
    message = f"{error.filename}: {error.strerror}"
  if isinstance(error, (ValueError, OSError, argparse.ArgumentError)) and message:
    return message
  return f"{type(error).__name__}: {message}" if message else type(error).__name__


def report_error(command: str, error: BaseException, verbose: bool) -> None:
  """Prints `uae-jax COMMAND: error: ...` to stderr, after the traceback if `verbose`."""
  if verbose:
    traceback.print_exception(error)
  print(f"uae-jax {command}: error: {one_line(error)}", file=sys.stderr, flush=True)
