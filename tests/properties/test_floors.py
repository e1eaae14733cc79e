"""Layering: imports point downwards, and heavy libraries are imported only where allowed."""

import ast
from pathlib import Path
import subprocess
import sys

import pytest

pytestmark = pytest.mark.fast

PACKAGE = Path(__file__).parents[2] / "uae_jax"

# From the bottom up. A file imports from lower lines and from its own folder; everything not listed is at the top.
FLOORS = (
  ("files", "http_client", "json_files", "metrics_file"),
  ("sharding", "trees", "draws", "plain", "cloud_storage"),
  ("options",),
  ("layers", "algorithms"),
  ("models",),
  ("small_world",),
  ("data",),
  ("weights",),
  ("embedders",),
  ("networks",),
  ("rollouts", "rewards"),
  ("training", "evaluation", "report"),
)
TOP = len(FLOORS)

# library -> the only places that may import it. Complete models of other libraries are for tests only.
CONFINED = {
  "torch": (),
  "diffusers": (),
  "peft": (),
  "transformers": ("data/", "small_world/"),
  "clu": ("training/metrics.py",),
  "tensorflow": ("training/metrics.py", "data/", "small_world/"),
  "tensorflow_datasets": ("data/", "small_world/"),
}


def floor(module: str) -> int:
  """Level of `uae_jax.<name>...`."""
  name = module.split(".")[1] if "." in module else ""
  return next((level for level, names in enumerate(FLOORS) if name in names), TOP)


def module_of(file: Path) -> str:
  return ".".join(("uae_jax", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def imports(file: Path, module: str):
  """Yields (line, dotted name) of every import, including those inside functions."""
  is_package = file.name == "__init__.py"
  for node in ast.walk(ast.parse(file.read_text(), str(file))):
    if isinstance(node, ast.Import):
      yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        parents = module.split(".")
        parents = parents[: len(parents) - node.level + is_package]
        base = ".".join([*parents, *filter(None, [node.module])])
      yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def violations(file: Path, module: str) -> list[str]:
  """Imports that point up or sideways, or that import a restricted library."""
  found = []
  place = "/".join(module.split(".")[1:]) + ("/" if file.name == "__init__.py" else ".py")
  for line, name in imports(file, module):
    where = f"uae_jax/{place}:{line} imports {name}"
    library = name.split(".")[0]
    if not place.startswith(CONFINED.get(library, (place,))):
      found.append(f"{where}: only in {', '.join(CONFINED[library]) or 'the tests'}")
    if library != "uae_jax" or module == "uae_jax":
      continue
    mine, theirs = floor(module), floor(name)
    same_folder = mine == TOP or module.split(".")[1] == name.split(".")[1]
    if theirs > mine or (theirs == mine and not same_folder):
      found.append(f"{where}: from floor {mine} to floor {theirs}")
  return found


def test_imports_point_downwards():
  found = [v for file in sorted(PACKAGE.rglob("*.py")) for v in violations(file, module_of(file))]
  assert not found, "\n".join(found)


@pytest.mark.parametrize(
  ("module", "source"),
  [
    ("uae_jax.models.clip", "from uae_jax.training import state"),
    ("uae_jax.models.clip", "import uae_jax.api"),
    ("uae_jax.models.clip", "def f():\n  from uae_jax.weights.clip import table"),
    ("uae_jax.models.clip", "from ..data import scenes"),
    ("uae_jax.layers.norms", "from uae_jax import models"),
    ("uae_jax.trees", "from uae_jax.layers import lora"),
    ("uae_jax.api", "import torch"),
    ("uae_jax.models.clip", "from transformers import CLIPModel"),
    ("uae_jax.training.state", "import tensorflow as tf"),
  ],
)
def test_a_wrong_import_is_found(tmp_path, module, source):
  file = tmp_path / "module.py"
  file.write_text(source)
  assert len(violations(file, module)) == 1


@pytest.mark.parametrize(
  ("module", "source"),
  [
    (
      "uae_jax.models.clip",
      "from uae_jax.models.vit import Encoder\nfrom . import uae\nfrom uae_jax import sharding",
    ),
    ("uae_jax.api", "from uae_jax.training import state\nfrom uae_jax import cli"),
    ("uae_jax.data.processing", "from transformers import AutoTokenizer"),
    ("uae_jax.training.metrics", "def f():\n  from clu import metric_writers"),
  ],
)
def test_a_right_import_is_allowed(tmp_path, module, source):
  file = tmp_path / "module.py"
  file.write_text(source)
  assert violations(file, module) == []


def test_the_command_line_is_light():
  heavy = ("jax", "jaxlib", "flax", "tensorflow", "torch", "transformers", "numpy", "orbax")
  code = f"import sys, uae_jax.cli; print([name for name in {heavy!r} if name in sys.modules])"
  assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
