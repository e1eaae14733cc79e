"""A fake model, and commands that run on it in this process."""

import json
from pathlib import Path

from PIL import Image

from uae_jax import cli
from uae_jax.weights.checkpoint import InferenceSettings

EVIL = "<script>alert(1)</script>"


class StandIn:
  """A fake `uae_jax.UAE`: captions state the image size, generated images are gray."""

  is_small_world = True
  inference = InferenceSettings(is_small_world=True)
  calls: list = []

  @classmethod
  def load(cls, path, **options):
    if not Path(path).is_dir():
      raise FileNotFoundError(f"{path}: no such model")
    cls.calls = [("load", options)]
    return cls()

  def caption(self, images, seed=0, **options):
    self.calls.append(("caption", len(images), seed, options))
    assert all(image.mode == "RGB" for image in images)
    return [f"{EVIL} {image.width}x{image.height}" for image in images]

  def generate(self, prompts, seed=0, **options):
    self.calls.append(("generate", list(prompts), seed, options))
    if "fail" in prompts:
      raise RuntimeError("out of memory")
    return [Image.new("RGB", (32, 32), "grey") for _ in prompts]

  def reconstruct(self, images, seed=0, **options):
    self.calls.append(("reconstruct", len(images), seed, options))
    return self.caption(images), [Image.new("RGB", (32, 32), "grey") for _ in images]

  def fingerprint(self):
    return "0123456789abcdef"

  def latents_shape(self, height=None, width=None):
    if (height or 16) % 16:
      raise ValueError("sides must be multiples of 16")


def run(*argv) -> int:
  """Runs a command like a process would, including the exits of argparse."""
  try:
    return cli.main([str(argument) for argument in argv])
  except SystemExit as error:
    return error.code


def lines(file: Path) -> list[dict]:
  return [json.loads(line) for line in file.read_text().splitlines()]
