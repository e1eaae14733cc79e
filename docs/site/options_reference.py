"""The options reference: type, range, default and documentation of each field of a dataclass and of those within it.

The classes are imported, which brings no JAX: a reader sees the defaults and ranges that a run has.
"""

from collections.abc import Iterator
import dataclasses
import importlib
import inspect
import re
from typing import Any

import griffe


class UndocumentedError(Exception):
  """Fields without documentation, or documentation without a field."""


def load(name: str) -> type:
  """The class of "module:Class"."""
  module, _, cls = name.partition(":")
  return getattr(importlib.import_module(module), cls)


def page(root: type) -> str:
  """The page in Markdown: `root`, then every dataclass reached from its fields, each once.

  Args:
    root: dataclass of the whole config.

  Raises:
    UndocumentedError: names every field that no class documents, and every documented name that is no field.
  """
  paths: dict[type, list[str]] = {}
  for cls, path in _walk(root, ""):
    paths.setdefault(cls, []).append(path)
  problems = [problem for cls in paths for problem in _problems(cls)]
  if problems:
    raise UndocumentedError("\n".join(problems))
  header = (
    "# Options\n\nEvery option of a config, from the docstrings and defaults of the source. Each is a flag of "
    "`uae-jax train` and `uae-jax plan`: the path of its section and its name, such as "
    "`--config.SECTION.FIELD=VALUE`.\n\n"
  )
  return header + "\n".join(_section(cls, paths) for cls in paths)


def _walk(cls: type, path: str) -> Iterator[tuple[type, str]]:
  """(class, its path in the config) of a dataclass and of those in its fields; breadth is that of the source."""
  yield cls, path
  for field in dataclasses.fields(cls):
    value = _default(field)
    if dataclasses.is_dataclass(value):
      yield from _walk(type(value), f"{path}.{field.name}" if path else field.name)


def _default(field: dataclasses.Field) -> Any:
  return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _documented(cls: type) -> tuple[str, dict[str, str]]:
  """(text of the class, documentation of its fields, inherited ones included)."""
  texts: list[str] = []
  fields: dict[str, str] = {}
  for base in reversed(cls.__mro__):
    if not dataclasses.is_dataclass(base):
      continue
    texts = []
    # A dataclass without docstring gets its signature as one.
    docstring = base.__doc__ or ""
    docstring = "" if docstring.startswith(f"{base.__name__}(") else docstring
    for section in griffe.Docstring(docstring).parse("google", warnings=False):
      if section.kind is griffe.DocstringSectionKind.text:
        texts.append(section.value)
      elif section.kind is griffe.DocstringSectionKind.attributes:
        fields |= {item.name: item.description for item in section.value}
  return "\n\n".join(texts), fields


def _problems(cls: type) -> list[str]:
  text, documented = _documented(cls)
  names = [field.name for field in dataclasses.fields(cls)]
  where = f"{cls.__module__}.{cls.__name__}"
  problems = [] if text else [f"{where}: has no summary above `Attributes:`"]
  problems += [f"{where}.{name}: is not documented under `Attributes:`" for name in names if not documented.get(name)]
  return problems + [f"{where}: documents {name}, which is no field" for name in documented if name not in names]


def _section(cls: type, paths: dict[type, list[str]]) -> str:
  text, documented = _documented(cls)
  where = ", ".join(f"`config.{path}`" for path in paths[cls] if path)
  lines = [f"## {cls.__name__}", "", text, ""]
  lines += [f"In the config: {where}.", ""] if where else []
  lines += ["| field | type | default | |", "|---|---|---|---|"]
  for field in dataclasses.fields(cls):
    default = _default(field)
    if type(default) in paths:
      kind = f"[{type(default).__name__}](#{type(default).__name__.lower()})"
      value = ""
    else:
      kind = f"`{_annotation(cls, field.name)}`"
      value = "required" if default is dataclasses.MISSING else f"`{default!r}`"
    lines.append(f"| `{field.name}` | {kind} | {value} | {_cell(documented[field.name] + _range(field))} |")
  return "\n".join(lines) + "\n"


def _annotation(cls: type, name: str) -> str:
  declared = next(base for base in cls.__mro__ if name in base.__dict__.get("__annotations__", {}))
  annotation = declared.__annotations__[name]
  text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
  return text.replace("collections.abc.", "")


def _range(field: dataclasses.Field) -> str:
  """The range as a sentence, where the field has one."""
  if not {"choices", "limits"} & set(field.metadata):
    return ""
  from uae_jax.options import base

  words = base.describe_range(field)
  return f" {words[0].upper()}{words[1:].replace(chr(39), '`')}." if words else ""


def _cell(text: str) -> str:
  """One line, with `|` escaped outside code spans, where the table would take it for a border."""
  spans = re.split(r"(`[^`]*`)", " ".join(text.split()))
  return "".join(span if span.startswith("`") else span.replace("|", "\\|") for span in spans)
