"""Command-line overrides of a config: `--config.SECTION.FIELD=VALUE`, typed by the dataclasses of the options."""

import ast
from collections.abc import Mapping, Sequence
import dataclasses
import difflib
import types
import typing
from typing import Any

from ml_collections import ConfigDict

from uae_jax.options.base import Options
from uae_jax.options.experiment import Experiment

PREFIX = "--config."
BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def split_flags(argv: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
  """([(dotted field, text), ...] of the overrides, all other arguments).

  Accepts `--config.x=v`, `--config.x v`, and for booleans also `--config.x` and `--noconfig.x`.
  """
  overrides, rest, arguments = [], [], list(argv)
  while arguments:
    argument = arguments.pop(0)
    if argument.startswith("--noconfig."):
      overrides.append((argument.removeprefix("--noconfig."), "false"))
    elif not argument.startswith(PREFIX):
      rest.append(argument)
    elif "=" in argument:
      path, _, text = argument.removeprefix(PREFIX).partition("=")
      overrides.append((path, text))
    else:
      has_value = bool(arguments) and not arguments[0].startswith("--")
      overrides.append((argument.removeprefix(PREFIX), arguments.pop(0) if has_value else "true"))
  return overrides, rest


def override(config: ConfigDict, path: str, text: str) -> None:
  """Sets one field of a config in place.

  Args:
    config: of `new_config`.
    path: dotted field, such as "pretrain.optimizer.learning_rate".
    text: the value as on the command line.

  Raises:
    ValueError: there is no such field, or the text is not of its type.
  """
  kind, section, where = Experiment, config, "config"
  *parents, name = path.split(".")
  for parent in parents:
    kind, section, where = field_type(kind, parent, where), section.get(parent), f"{where}.{parent}"
  kind = field_type(kind, name, where)
  if isinstance(kind, type) and issubclass(kind, Options):
    names = ", ".join(field.name for field in dataclasses.fields(kind))
    raise ValueError(f"{where}.{name} is a section: set one of its fields ({names})")
  if typing.get_origin(kind) is Mapping:
    raise ValueError(f"{where}.{name} is a section: set one of its names, such as {where}.{name}.clip")
  section[name] = parse(text, kind, f"{where}.{name}")


def field_type(kind: Any, name: str, where: str) -> Any:
  """The type of a field of a section.

  Raises:
    ValueError: the section has no such field; names the field that was probably meant.
  """
  if typing.get_origin(kind) is Mapping:
    return typing.get_args(kind)[1]
  if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
    raise ValueError(f"{where} is a value, not a section: it has no field {name!r}")
  hints = typing.get_type_hints(kind)
  if name not in hints:
    raise ValueError(f"{where} ({kind.__name__}) has no field {name!r}{suggestion(kind, name, where)}")
  return hints[name]


def suggestion(kind: Any, name: str, where: str) -> str:
  """The probable field of a misspelled name, or the place of a field of that name in a section below."""
  hints = typing.get_type_hints(kind)
  deeper = [
    f"{where}.{section}.{name}"
    for section, inner in hints.items()
    if dataclasses.is_dataclass(inner) and name in typing.get_type_hints(inner)
  ]
  near = difflib.get_close_matches(name, hints, n=1)
  meant = deeper[:1] or [f"{where}.{field}" for field in near]
  return f", did you mean {meant[0]}?" if meant else f"; it has {', '.join(sorted(hints))}"


def parse(text: str, kind: Any, where: str) -> Any:
  """A value of a type from its text.

  Raises:
    ValueError: the text is no such value.
  """
  if kind is str:
    return text
  if isinstance(kind, types.UnionType):
    inner = next(option for option in typing.get_args(kind) if option is not types.NoneType)
    return None if text in ("", "None", "none") else parse(text, inner, where)
  problem = ValueError(f"{where} = {text!r}: expected {describe(kind)}")
  if kind is bool:
    if text.lower() not in BOOLEANS:
      raise problem
    return BOOLEANS[text.lower()]
  try:
    if kind in (int, float):
      return kind(text)
    if text.lstrip()[:1] in ("(", "["):
      return convert(ast.literal_eval(text), kind, problem)
    items = [item.strip() for item in text.split(",") if item.strip()]
    return convert([parse(item, element_types(kind, len(items), problem)[0], where) for item in items], kind, problem)
  except (ValueError, SyntaxError, TypeError) as error:
    raise problem from error


def convert(value: Any, kind: Any, problem: ValueError) -> Any:
  """A Python literal as a value of a type; tuples may be written as lists, and one item without its comma."""
  if typing.get_origin(kind) is tuple:
    items = list(value) if isinstance(value, list | tuple) else [value]
    return tuple(convert(x, t, problem) for x, t in zip(items, element_types(kind, len(items), problem), strict=True))
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
    raise problem
  return value


def element_types(kind: Any, count: int, problem: ValueError) -> list[Any]:
  """The types of the `count` elements of a tuple type."""
  kinds = typing.get_args(kind)
  if kinds[-1] is Ellipsis:
    return [kinds[0]] * count
  if len(kinds) != count:
    raise problem
  return list(kinds)


def describe(kind: Any) -> str:
  """A type in words."""
  names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
  if kind in names:
    return names[kind]
  kinds = typing.get_args(kind)
  if kinds[-1] is Ellipsis:
    return f"a tuple, each item {describe(kinds[0])}, such as " + ("a,b" if kinds[0] is str else '(("clip", 1.0),)')
  return f"{len(kinds)} values ({', '.join(describe(item) for item in kinds)}), such as (0, 4)"
