"""Stands for a model in tests of `uae-jax evaluate`: what it makes is a function of its inputs, and it counts calls."""

import types

import numpy as np
from PIL import Image

from uae_jax.weights.checkpoint import InferenceSettings

SIDE = 16


def gray(level: int) -> Image.Image:
  return Image.new("RGB", (SIDE, SIDE), (level,) * 3)


class StandIn:
  """Captions and answers name the gray level of an image; images have the gray level that their prompt names."""

  inference = InferenceSettings(resolution_px=SIDE, steps=4, guidance=1.0, max_new_tokens=9)
  processor = types.SimpleNamespace(
    negative_prompt="bad",
    question="describe",
    ignores_questions=False,
    generation_prompt=str.split,
    encode=str.split,
  )
  is_small_world = False

  def __init__(self, answers=None):
    self.calls, self.answers = [], answers or {}

  def fingerprint(self):
    return "0123456789abcdef"

  def latents_shape(self, height, width):
    return (1, 1, 16)

  def caption(self, images, seed=0, indices=None, **options):
    return [f"gray {np.asarray(image).mean():.0f}" for image in self._seen("caption", images)]

  def answer(self, images, questions, seed=0, indices=None, **options):
    self._seen("answer", images)
    return [self.answers.get(question.split("\n")[0], "no idea") for question in questions]

  def choice_log_probs(self, images, questions, choices, batch_size):
    return [np.linspace(-1.0, -2.0, len(row), dtype=np.float32) for row in choices]

  def generate(self, prompts, *, latents=None, **options):
    self._seen("generate", prompts)
    return [gray(int(prompt.split()[-1])) for prompt in prompts]

  def reconstruct(self, images, **options):
    captions = self.caption(images)
    return captions, self.generate(captions)

  def _seen(self, kind, items):
    self.calls += [(kind, len(items))]
    return items

  def count(self, kind) -> int:
    return sum(number for name, number in self.calls if name == kind)
