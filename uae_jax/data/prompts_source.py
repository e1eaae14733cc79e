"""Source of prompts without images, for stage 3 with rewards that need no original."""

import os
from typing import Any

from uae_jax.data import records
from uae_jax.data.file_sources import JsonLinesSource
from uae_jax.data.prompt_lines import JSON_SUFFIXES
from uae_jax.data.records import Fields

PROMPT = "prompt"


class PromptsSource(JsonLinesSource):
  """One prompt per line: JSON objects in a file called .jsonl or .json, else the lines themselves.

  Records have no image. All other fields of an object are metadata, which the external reward receives.

  Args:
    path: the file.
    fields: `caption` is the field of the prompt; "" is "prompt".
    index_dir: see `JsonLinesSource`.
  """

  def __init__(self, path: str, fields: Fields = records.DEFAULT_FIELDS, index_dir: str = ""):
    self._is_json = os.path.splitext(path)[1].lower() in JSON_SUFFIXES
    super().__init__(path, Fields(caption=fields.caption or PROMPT, choice=fields.choice), index_dir)

  def _refuse_other_formats(self, start: bytes) -> None:
    if self._is_json or not start.startswith(b"["):
      super()._refuse_other_formats(start)

  def __getitem__(self, index: int) -> dict:
    return records.chosen(records.captions_of(self._record(index), self._fields), self._fields)

  def _parse(self, line: bytes) -> dict[str, Any]:
    if self._is_json:
      return super()._parse(line)
    try:
      return {self._fields.caption: line.decode().strip()}
    except UnicodeDecodeError as error:
      raise ValueError(f"not UTF-8 text (byte {error.start} of the line)") from error

  def metadata(self, index: int) -> dict[str, Any]:
    """The fields of a record besides the prompt."""
    return {name: value for name, value in self._record(index).items() if name != self._fields.caption}
