"""The options reference: every dataclass of a module with type, default and documentation of every field.

Read from the source without importing it, so that types and defaults are what the author wrote.
"""

from pathlib import Path
import re

import griffe


class UndocumentedError(Exception):
  """Fields without documentation, or documentation without a field."""


def page(modules: list[str], root: Path) -> str:
  """The page in Markdown.

  Args:
    modules: dotted names, in the order of the page.
    root: the folder that holds the package.

  Raises:
    UndocumentedError: names every field that its class does not document, and every documented name that is no field.
  """
  classes = [(module, found) for module in modules for found in _dataclasses(module, root)]
  anchors = {found.name: found.name.lower() for _, found in classes}
  problems = [problem for module, found in classes for problem in _problems(module, found)]
  if problems:
    raise UndocumentedError("\n".join(problems))
  header = (
    "# Options\n\nEvery field of every options class, from the docstrings of the source. A field is a flag: "
    "`--config.SECTION.FIELD=VALUE`, where `SECTION` is where the config holds the class.\n\n"
  )
  return header + "\n".join(_section(found, anchors) for _, found in classes)


def _dataclasses(module: str, root: Path) -> list[griffe.Class]:
  loaded = griffe.load(module, search_paths=[root], allow_inspection=False, resolve_aliases=False)
  return [found for found in loaded.classes.values() if not found.is_alias and "dataclass" in found.labels]


def _fields(found: griffe.Class) -> dict[str, griffe.Attribute]:
  return {
    name: attribute
    for name, attribute in found.attributes.items()
    if attribute.annotation is not None and "ClassVar" not in str(attribute.annotation) and not name.startswith("_")
  }


def _documented(found: griffe.Class) -> tuple[str, dict[str, str]]:
  """(text before and between the sections, documentation of the fields)."""
  if found.docstring is None:
    return "", {}
  texts, fields = [], {}
  for section in found.docstring.parse("google", warnings=False):
    if section.kind is griffe.DocstringSectionKind.text:
      texts.append(section.value)
    elif section.kind is griffe.DocstringSectionKind.attributes:
      fields |= {item.name: item.description for item in section.value}
  return "\n\n".join(texts), fields


def _problems(module: str, found: griffe.Class) -> list[str]:
  text, documented = _documented(found)
  fields = _fields(found)
  where = f"{module}.{found.name}"
  problems = [] if text else [f"{where}: has no summary above `Attributes:`"]
  problems += [f"{where}.{name}: is not documented under `Attributes:`" for name in fields if not documented.get(name)]
  return problems + [f"{where}: documents {name}, which is no field" for name in documented if name not in fields]


def _section(found: griffe.Class, anchors: dict[str, str]) -> str:
  text, documented = _documented(found)
  lines = [f"## {found.name}", "", text, "", "| field | type | default | |", "|---|---|---|---|"]
  for name, field in _fields(found).items():
    lines.append(f"| `{name}` | {_type(field, anchors)} | {_default(field)} | {_cell(documented[name])} |")
  return "\n".join(lines) + "\n"


def _type(field: griffe.Attribute, anchors: dict[str, str]) -> str:
  text = str(field.annotation)
  links = [f"[{name}](#{anchor})" for name, anchor in anchors.items() if name in text.replace('"', "").split(" | ")]
  return links[0] if links and text.strip('"') in anchors else f"`{text}`"


def _default(field: griffe.Attribute) -> str:
  if field.value is None:
    return "required"
  text = str(field.value)
  for prefix in ("dataclasses.field(default_factory=", "field(default_factory="):
    if text.startswith(prefix):
      text = text.removeprefix(prefix).removesuffix(")")
      text = text.removeprefix("lambda: ") if text.startswith("lambda: ") else f"{text}()"
  return f"`{' '.join(text.split())}`"


def _cell(text: str) -> str:
  """One line, with `|` escaped outside code spans, where the table would take it for a border."""
  spans = re.split(r"(`[^`]*`)", " ".join(text.split()))
  return "".join(span if span.startswith("`") else span.replace("|", "\\|") for span in spans)
