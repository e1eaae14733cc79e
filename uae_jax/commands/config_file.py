"""Reads a config file and command-line overrides into a typed config."""

import argparse
from collections.abc import Iterator, Sequence
import contextlib
import importlib.util
from pathlib import Path
import sys
import traceback
import types

from ml_collections import ConfigDict

from uae_jax.commands.command_line import Parser
from uae_jax.files import local_path
from uae_jax.options import Experiment, read_config
from uae_jax.options.flags import override, split_flags


def load_module(spec: str) -> types.ModuleType:
  """Executes a config file and returns its module.

  The file may import its neighbors, and the package `configs` if its folder has that name, as a script could.

  Args:
    spec: "FILE" or "FILE:ARGUMENT".

  Raises:
    ValueError: the file does not exist or is not a config.
  """
  file, _ = _split(spec)
  module_spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
  if module_spec is None or module_spec.loader is None:
    raise ValueError(f"--config={spec}: not a Python file")
  module = importlib.util.module_from_spec(module_spec)
  with _code_of(spec, file):
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
      raise ValueError("the file defines no get_config")
  return module


def load_config(spec: str) -> ConfigDict:
  """Loads a config file and returns the result of its `get_config`.

  Args:
    spec: "FILE", or "FILE:ARGUMENT" for `get_config(ARGUMENT)`.

  Raises:
    ValueError: the file does not exist or is not a config.
  """
  module = load_module(spec)
  file, argument = _split(spec)
  with _code_of(spec, file):
    config = module.get_config(argument) if argument else module.get_config()
    if not isinstance(config, ConfigDict):
      raise ValueError(f"get_config returned {type(config).__name__}, expected what uae_jax.options.new_config makes")
    return config


def _split(spec: str) -> tuple[Path, str]:
  """(file, argument or "").

  Raises:
    ValueError: there is no such file.
  """
  try:
    name, _, argument = local_path(spec).partition(":")
  except ValueError as error:
    raise ValueError(f"--config={error}") from error
  if not Path(name).is_file():
    raise ValueError(
      f"--config={spec}: no such file; configs are not part of the installed package, use those of a checkout"
    )
  return Path(name), argument


@contextlib.contextmanager
def _code_of(spec: str, file: Path) -> Iterator[None]:
  """Context for code of a config file: it may import its neighbors, and any failure is reported with its place."""
  folders = [str(file.parent.resolve()), str(file.parent.parent.resolve())]
  sys.path[:0] = folders
  try:
    yield
  except Exception as error:
    raise ValueError(f"--config={spec}: {place(error, folders)}{type(error).__name__}: {error}") from error
  finally:
    for folder in folders:
      sys.path.remove(folder)


def place(error: Exception, folders: Sequence[str]) -> str:
  """The innermost line in the folder of a config that an error comes from, as "FILE:LINE: "; "" if there is none."""
  if isinstance(error, SyntaxError) and error.filename:
    return f"{error.filename}:{error.lineno}: "
  inside = [f for f in traceback.extract_tb(error.__traceback__) if str(Path(f.filename).resolve().parent) in folders]
  return f"{inside[-1].filename}:{inside[-1].lineno}: " if inside else ""


def parse(parser: Parser, argv: Sequence[str]) -> tuple[argparse.Namespace, Experiment]:
  """Parses the command's own arguments and its config, with all overrides applied and checked.

  Args:
    parser: receives the argument `--config`.
    argv: arguments of the command, without its name.

  Raises:
    argparse.ArgumentError: a field is unknown, or a value has the wrong type.
    ValueError: the config cannot be read, or a value is out of range.
  """
  parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="experiment, such as configs/scenes.py")
  overrides, rest = split_flags(argv)
  arguments = parser.parse_args(rest)
  config = load_config(arguments.config)
  for path, text in overrides:
    try:
      override(config, path, text)
    except ValueError as error:
      raise argparse.ArgumentError(None, str(error)) from error
  # A command that runs only some of the stages must not fail because of the others.
  chosen = getattr(arguments, "stages", None)
  if chosen:
    unknown = set(chosen.split(",")) - set(config.stages)
    if unknown:
      raise ValueError(f"--stages names {', '.join(sorted(unknown))}, config.stages are {', '.join(config.stages)}")
    config.stages = tuple(chosen.split(","))
  try:
    return arguments, read_config(config)
  except ValueError as error:
    raise argparse.ArgumentError(None, str(error)) from error
