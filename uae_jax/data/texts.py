"""Checks of texts that a model will read."""

from collections.abc import Sequence

from uae_jax.data.records import encodable
from uae_jax.options.sampling import MAX_TEXT_CHARACTERS


def checked_texts(name: str, values: Sequence[str]) -> list[str]:
  """Checks an argument that is a list of texts.

  Raises:
    ValueError: it is one text, or an item is no text or too long: a model would need all memory for it.
  """
  if isinstance(values, str):
    raise ValueError(f"{name} is one text, expected a list of texts")
  for position, text in enumerate(values):
    if not isinstance(text, str):
      raise ValueError(f"{name}[{position}] is of type {type(text).__name__}, expected a text")
    if len(text) > MAX_TEXT_CHARACTERS:
      raise ValueError(f"{name}[{position}] has {len(text)} characters, expected {MAX_TEXT_CHARACTERS} or fewer")
    encodable(text, f"{name}[{position}]")
  return list(values)
