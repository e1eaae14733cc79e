"""Every recipe of CONTRIBUTING.md works: it is applied to a copy of the repository, and its commands run there."""

import dataclasses
import os
from pathlib import Path
import re
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = Path(__file__).parents[2]
COPIED = ("uae_jax", "tests", "configs", "pyproject.toml")
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', flags=re.M | re.S)


@dataclasses.dataclass(frozen=True)
class Block:
  """A fenced block: a new file, a change of a file (diff), or commands (sh)."""

  language: str
  target: str
  text: str


def recipes() -> dict[str, list[Block]]:
  """Heading -> blocks, in document order."""
  text = (ROOT / "CONTRIBUTING.md").read_text().partition("\n## Recipes\n")[2]
  sections = re.split(r"^### ", text, flags=re.M)[1:]
  return {section.partition("\n")[0]: [Block(*found) for found in BLOCK.findall(section)] for section in sections}


def changed(text: str, diff: str, target: str) -> str:
  """Applies a diff to a file; its hunks, separated by `@@` lines, are located by context, not by line numbers."""
  for piece in re.split(r"^@@.*\n", diff, flags=re.M):
    lines = piece.splitlines()
    before = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "+")
    after = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "-")
    assert before and text.count(before) == 1, f"{target}: expected once, found {text.count(before)} times:\n{before}"
    text = text.replace(before, after)
  return text


def apply(block: Block, root: Path) -> None:
  file = root / block.target
  if block.language == "diff":
    file.write_text(changed(file.read_text(), block.text, block.target))
  else:
    assert not file.exists(), f"{block.target} exists"
    file.write_text(block.text)


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_works(name, tmp_path):
  blocks = recipes()[name]
  commands = [line for block in blocks if block.language == "sh" for line in block.text.splitlines()]
  assert commands, "a recipe ends with the commands that check it"
  for entry in COPIED:
    if (ROOT / entry).is_dir():
      shutil.copytree(ROOT / entry, tmp_path / entry, ignore=shutil.ignore_patterns("__pycache__"))
    else:
      shutil.copy(ROOT / entry, tmp_path / entry)
  for block in blocks:
    if block.language != "sh":
      assert block.target, f"a block of {block.language} without a title"
      apply(block, tmp_path)
  files = [block.target for block in blocks if block.target.endswith(".py")]
  for command in (["ruff", "check", *files], ["ruff", "format", "--check", *files], *map(shlex.split, commands)):
    run(command, tmp_path)


def run(command: list[str], folder: Path) -> None:
  """Runs a command in the copy, with the Python and the tools of this environment."""
  program = sys.executable if command[0] == "python" else str(Path(sys.executable).with_name(command[0]))
  environment = os.environ | {"PYTHONPATH": str(folder)}
  done = subprocess.run([program, *command[1:]], cwd=folder, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"


def test_a_change_is_found_by_its_context():
  text = "a\nb\nc\nb\nd\n"
  assert changed(text, " a\n-b\n+x\n@@\n b\n+y\n d\n", "file") == "a\nx\nc\nb\ny\nd\n"
  with pytest.raises(AssertionError, match="found 2 times"):
    changed(text, "-b\n", "file")
  with pytest.raises(AssertionError, match="found 0 times"):
    changed(text, " b\n-a\n", "file")
