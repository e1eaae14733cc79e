"""Fixtures of the commands: a fake model in the working folder, and ordinary pictures."""

import sys
import types

import numpy as np
from PIL import Image
import pytest

from tests.end_to_end.stand_in_model import StandIn


@pytest.fixture
def model(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "uae_jax.api", types.SimpleNamespace(UAE=StandIn))
  monkeypatch.chdir(tmp_path)
  (tmp_path / "model").mkdir()
  return "model"


@pytest.fixture
def photographs(tmp_path):
  """Ordinary image files of every mode and of odd sizes."""
  folder = tmp_path / "photographs"
  folder.mkdir()
  for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "F"):
    suffix = {"CMYK": "jpg", "F": "tiff"}.get(mode, "png")
    name = f"mode_{mode.replace(';', '')}.{suffix}"
    if mode == "I;16":
      Image.fromarray(np.full((5, 7), 40000, np.uint16)).save(folder / name)
    else:
      Image.new(mode, (7, 5)).save(folder / name)
  return folder
