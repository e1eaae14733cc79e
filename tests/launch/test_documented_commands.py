"""Every command of the launchers in the docs runs as it stands there, with --dry-run, on a computer without gcloud."""

import importlib
from pathlib import Path
import re
import shlex

import pytest

pytestmark = pytest.mark.fast

DOCS = Path(__file__).parents[2] / "docs"
PAGES = (DOCS / "cloud_tpu.md", *sorted((DOCS / "launch").glob("*.md")))


def commands(page: Path) -> list[list[str]]:
  """The words of each command `python -m launch.NAME ...` in the code blocks of a page, up to a pipe."""
  found = []
  for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
    for line in block.replace("\\\n", " ").splitlines():
      words = shlex.split(line, comments=True) if line.startswith("python -m launch.") else []
      # ENGINE and COMMAND stand for words that the table explains.
      if words and "launch.ENGINE" not in words:
        found.append(words[: words.index("|") if "|" in words else None])
  return found


DOCUMENTED = [
  pytest.param(words, id=f"{page.stem}-{words[2]}-{words[3]}") for page in PAGES for words in commands(page)
]


def test_every_launcher_is_documented():
  found = {param.values[0][2].removeprefix("launch.") for param in DOCUMENTED}
  assert found == {"tpu_vm", "jobset", "xpk", "skypilot", "image"}


@pytest.mark.parametrize("words", DOCUMENTED)
def test_documented_commands_run(words, capfd, monkeypatch):
  monkeypatch.setenv("PATH", "")  # Nothing is run.
  cut = words.index("--") if "--" in words else len(words)
  dry = [] if "--dry-run" in words else ["--dry-run"]
  assert importlib.import_module(words[2]).main([*words[3:cut], *dry, *words[cut:]]) == 0
  printed = capfd.readouterr()
  assert printed.out and "note:" not in printed.err
