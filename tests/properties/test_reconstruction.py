"""Evaluation generates images with the conditioning of the training stage."""

import jax
import numpy as np

from tests.properties import rl_world
from uae_jax.evaluation.reconstruction import Reconstructor
from uae_jax.options import EvaluationOptions
from uae_jax.rollouts.conditioning import answer_context


def test_answer_conditioning_reads_the_captioners_own_pixels(monkeypatch):
  """If the captioner's cells do not divide the image, captioner and decoder use different image sizes."""
  seen = []

  def recorded(prompts, model, images, tokens):
    seen.append(images.shape)
    return answer_context(prompts, model, images, tokens)

  monkeypatch.setattr("uae_jax.rollouts.reconstruct.answer_context", recorded)
  draws = np.random.default_rng(0)
  images = draws.integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
  smaller = draws.integers(0, 255, (2, 16, 16, 3), dtype=np.uint8)
  tokens = np.full((2, 4), 5, np.int32)
  options = EvaluationOptions(batch_size=2, sampler_steps=1, conditioning="answer", embedders=())
  reconstructor = Reconstructor(rl_world.built().networks, options)
  with jax.set_mesh(rl_world.mesh()):
    reconstructions, similarities = reconstructor.generate(rl_world.params(), images, tokens, captioner_images=smaller)
  assert seen == [smaller.shape]
  assert reconstructions.shape == images.shape and np.all(np.isfinite(similarities["psnr"]))
