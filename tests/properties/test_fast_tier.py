"""The fast tier stays fast: its files import no other framework, and no test helper that does."""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

TESTS = Path(__file__).parents[1]
SLOW_LIBRARIES = {"torch", "diffusers", "peft", "transformers", "tensorflow", "tensorflow_datasets", "clu", "skimage"}


def is_fast(file: Path) -> bool:
  """Whether the whole file is marked, with one line at module level."""
  return any(ast.unparse(node) == "pytestmark = pytest.mark.fast" for node in ast.parse(file.read_text()).body)


def imported(file: Path) -> set[str]:
  """Dotted names that a file imports, including those in functions and in imported test helpers."""
  names = set()
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
  for name in list(names):
    for helper in (name, name.rpartition(".")[0]):
      path = TESTS.parent.joinpath(*helper.split(".")).with_suffix(".py")
      if helper.startswith("tests.") and path.exists():
        names |= imported(path)
  return names


def problems(file: Path) -> list[str]:
  libraries = {name.split(".")[0] for name in imported(file)}
  return [f"{file.name} is marked fast and imports {name}" for name in sorted(libraries & SLOW_LIBRARIES)]


def test_fast_files_import_no_other_framework():
  files = [file for file in sorted(TESTS.rglob("test_*.py")) if is_fast(file)]
  assert len(files) > 20
  assert [problem for file in files for problem in problems(file)] == []


def test_the_mark_is_on_whole_files():
  """`conftest.py` finds the tier by text before a file is imported; it would misread a mark on a single test."""
  marked = {file.name for file in TESTS.rglob("test_*.py") if "pytest.mark.fast" in file.read_text()}
  assert marked == {file.name for file in TESTS.rglob("test_*.py") if is_fast(file)}


@pytest.mark.parametrize("source", ["import torch", "def f():\n  from diffusers.models import x", "import peft.tuners"])
def test_a_slow_import_is_found(tmp_path, source):
  file = tmp_path / "test_x.py"
  file.write_text(source)
  assert len(problems(file)) == 1
