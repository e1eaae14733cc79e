"""Items that are prompts in a text file or a JSON lines file, as `uae-jax generate` reads them."""

from pathlib import Path

from uae_jax.data.prompt_lines import read_lines
from uae_jax.evaluation.suites.spec import Prompt, SuiteError


def read(path: Path) -> list[Prompt]:
  """Reads one prompt per line; the key of a prompt is its position.

  Raises:
    SuiteError: there is no prompt, or a line has none.
  """
  if path.is_dir():
    raise SuiteError(f"{path}: a folder, expected a text file with one prompt per line, or JSON lines")
  items = []
  for index, line in enumerate(read_lines(path)):
    try:
      items.append(Prompt(str(index), index, line.prompt()))
    except ValueError as error:
      raise SuiteError(f"{line}: {error}") from error
  return items
