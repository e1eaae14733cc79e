"""What the commands share: a parser whose errors are one line, and the printing of errors.

Nothing heavy is imported here: `uae-jax <command> --help` answers in well under a second.
"""

import argparse
import sys
import traceback


class Parser(argparse.ArgumentParser):
  """The parser of `uae-jax <command>`."""

  def __init__(self, command: str, description: str, epilog: str = ""):
    super().__init__(
      prog=f"uae-jax {command}",
      description=description,
      epilog=epilog,
      allow_abbrev=False,
    )
    # `cli.main` acts on it for every command; it is declared here for the help text and for direct calls.
    self.add_argument(
      "--verbose", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )

  def error(self, message: str):
    """One line instead of argparse's usage and error."""
    self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def given(arguments: argparse.Namespace, *names: str) -> dict:
  """The named options that have a value; the others keep the default of the function they are passed to."""
  return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}


def one_line(error: BaseException) -> str:
  """An error's message as one line; errors that are not about the user's input carry their type."""
  message = " ".join(str(error).split())
  if isinstance(error, OSError) and error.filename is not None and error.strerror:
    message = f"{error.filename}: {error.strerror}"
  if isinstance(error, (ValueError, OSError, argparse.ArgumentError)) and message:
    return message
  return f"{type(error).__name__}: {message}" if message else type(error).__name__


def report_error(command: str, error: BaseException, verbose: bool) -> None:
  """`uae-jax caption: error: ...` on stderr, after the traceback if asked for."""
  if verbose:
    traceback.print_exception(error)
  print(f"uae-jax {command}: error: {one_line(error)}", file=sys.stderr, flush=True)
