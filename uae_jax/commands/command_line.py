"""What the commands share: a parser whose errors are one line, and the printing of errors.

Nothing heavy is imported here: `uae-jax <command> --help` answers in well under a second.
"""

import argparse
from collections.abc import Callable
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


def parse_config_flags(command: str, argv: list[str], define: Callable, needed: tuple[str, ...]):
  """The absl flags of a command that takes `--config=FILE` and `--config.FIELD=VALUE`.

  Args:
    command: of `uae-jax`.
    argv: its arguments.
    define: (absl.flags, flag values) -> None; adds the command's own flags.
    needed: flags that must be given.

  Returns:
    `absl.flags.FlagValues`; `.config` is locked.

  Raises:
    argparse.ArgumentError: an unknown, missing or impossible flag.
  """
  from absl import flags
  from ml_collections import config_flags

  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, "experiment", lock_config=True, flag_values=values)
  define(flags, values)
  try:
    rest = values([f"uae-jax {command}", *argv])[1:]
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
    # ml_collections wraps a KeyError in an AttributeError; a KeyError's own text is the representation of its message.
    message = error
    while isinstance(message, (AttributeError, KeyError)) and message.args:
      message = message.args[0]
    raise argparse.ArgumentError(None, " ".join(str(message).split())) from error
  if rest:
    raise argparse.ArgumentError(None, f"unknown argument {rest[0]!r}")
  for name in needed:
    if getattr(values, name) is None:
      raise argparse.ArgumentError(None, f"--{name} is needed")
  return values


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
