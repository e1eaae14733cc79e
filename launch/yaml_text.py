"""Writes plain data as YAML, with the standard library only."""

import json
import re

PLAIN = re.compile(r"[A-Za-z/][-\w./]*(:[-\w./]+)*", re.ASCII)
WORDS = ("true", "false", "null", "yes", "no", "on", "off", "y", "n")


def scalar(value: str | int | bool | None) -> str:
  """One scalar; text is quoted unless no reader can take it for something else."""
  if not isinstance(value, str):
    return json.dumps(value)
  if PLAIN.fullmatch(value) and value.lower() not in WORDS:
    return value
  # As in JSON, but YAML knows no surrogates.
  quoted = json.dumps(value, ensure_ascii=False)
  return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted)


def lines(value: object) -> list[str]:
  """The lines of a value as a block, without indentation."""
  out: list[str] = []
  if isinstance(value, dict) and value:
    for key, item in value.items():
      block = lines(item)
      is_block = isinstance(item, dict | list) and bool(item)
      if isinstance(item, str) and item.endswith("\n") and not item.startswith((" ", "\n")) and is_clean(item):
        out += [f"{scalar(key)}: |", *(f"  {line}".rstrip() for line in item[:-1].split("\n"))]
      elif is_block:
        out += [f"{scalar(key)}:", *(f"  {line}" for line in block)]
      else:
        out.append(f"{scalar(key)}: {block[0]}")
  elif isinstance(value, list) and value:
    for item in value:
      first, *rest = lines(item)
      out += [f"- {first}", *(f"  {line}" for line in rest)]
  elif isinstance(value, dict | list):
    out.append("{}" if isinstance(value, dict) else "[]")
  else:
    assert value is None or isinstance(value, str | int | bool)
    out.append(scalar(value))
  return out


def is_clean(text: str) -> bool:
  """Whether text survives as a literal block."""
  return not text.endswith("\n\n") and all(line.isprintable() and line == line.rstrip() for line in text.split("\n"))


def dump(documents: list[dict]) -> str:
  """The documents as one YAML stream."""
  return "---\n".join("\n".join(lines(document)) + "\n" for document in documents)
