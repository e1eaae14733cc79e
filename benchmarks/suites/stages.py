"""The phases of stages 2 and 3 at a size, for the suites of whole steps and of single updates."""

import jax
import jax.numpy as jnp

from benchmarks import inputs
from benchmarks.world import World
from uae_jax.options import (
  AdvantageOptions,
  GenerationForUnderstandingOptions,
  ImageObjective,
  TokenObjective,
  UnderstandingForGenerationOptions,
  UpdateOptions,
)
from uae_jax.training.rl.phases import Phases
from uae_jax.training.stages import generation_for_understanding, understanding_for_generation


def captioner_phases(world: World, **options) -> Phases:
  """Phases of stage 2 with DAPO's token mean and no reference policy."""
  size = world.size
  settings = dict(
    num_rollouts=size.rollouts,
    max_new_tokens=size.caption_tokens,
    sampler_steps=size.reward_steps,
    logit_chunks=size.update_chunks,
    decode_chunks=size.decode_chunks,
  )
  return generation_for_understanding.make_phases(
    world.networks,
    GenerationForUnderstandingOptions(**settings | options),
    TokenObjective(),
    AdvantageOptions(),
    UpdateOptions(),
    world.optimizer,
  )


def decoder_phases(world: World) -> Phases:
  """Phases of stage 3 with the window at the start of the schedule and one initial noise per group."""
  size = world.size
  return understanding_for_generation.make_phases(
    world.networks,
    UnderstandingForGenerationOptions(
      num_rollouts=size.rollouts,
      max_new_tokens=size.caption_tokens,
      temperature=1.0,
      sampler_steps=size.sde_steps,
      window=size.window,
      window_strategy="fixed",
      window_range=(0, 1),
      decode_chunks=size.decode_chunks,
    ),
    ImageObjective(),
    AdvantageOptions(),
    UpdateOptions(),
    world.optimizer,
  )


def batch(world: World) -> dict:
  size = world.size
  return {
    "image": jnp.asarray(inputs.images(size, size.image_px, size.prompts)),
    "tokens": jnp.asarray(inputs.captions(size)[:, 0]),
    "captioner_image": jnp.asarray(inputs.images(size, size.caption_px, size.prompts)),
  }


class Stepper:
  """Calls `step(state, ...) -> (state, metrics)` and keeps the new state, because each call donates the old one."""

  def __init__(self, step, state):
    self._step, self._state = step, state

  def __call__(self, *arguments):
    self._state, metrics = self._step(self._state, *arguments)
    jax.block_until_ready((self._state.trainable, metrics))
    return metrics
