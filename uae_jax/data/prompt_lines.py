"""Prompts of a text or JSON lines file, for commands that generate."""

import dataclasses
import json
from pathlib import Path

from uae_jax import files
from uae_jax.options.sampling import MAX_TEXT_CHARACTERS

JSON_SUFFIXES, TABLES = (".jsonl", ".json"), (".csv", ".tsv", ".parquet", ".xlsx")


@dataclasses.dataclass(frozen=True)
class Line:
  """A prompt as it was given, not yet read; its string names it in messages."""

  place: str
  text: str
  is_json: bool = False

  def __str__(self) -> str:
    return self.place

  def prompt(self) -> str:
    """The prompt.

    Raises:
      ValueError: the line has none, or one that is too long.
    """
    prompt = _prompt_of(self.text) if self.is_json else self.text
    if files.SURROGATES.search(prompt):
      raise ValueError("the prompt has characters that are not Unicode text")
    if len(prompt) > MAX_TEXT_CHARACTERS:
      raise ValueError(f"the prompt has {len(prompt)} characters, expected {MAX_TEXT_CHARACTERS} or fewer")
    return prompt


def _prompt_of(line: str) -> str:
  try:
    record = json.loads(line)
    prompt = record["prompt"] if "prompt" in record else record["caption"]
    if not isinstance(prompt, str):
      raise TypeError(type(prompt).__name__)
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    raise ValueError('expected a JSON object with the text "prompt" or "caption"') from error
  return prompt


def read_lines(file: Path) -> list[Line]:
  """Reads a text or JSON lines file; empty lines are skipped.

  Raises:
    ValueError: the file is a table, or has no prompt.
  """
  suffix = file.suffix.lower()
  if suffix in TABLES:
    raise ValueError(f"{file}: a table: write its prompts as text, one per line, or as JSON lines")
  numbered = enumerate(files.read_lines(file), 1)
  lines = [Line(f"{file}:{n}", text.strip(), suffix in JSON_SUFFIXES) for n, text in numbered if text.strip()]
  if not lines:
    raise ValueError(f"{file}: no prompt in this file")
  return lines
