"""Guidance in an interval of noise levels: half the work outside of it, and the same branch in rollout and replay."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax.algorithms import samplers
from uae_jax.evaluation import results, settings
from uae_jax.options import Experiment, GenerationOptions, UnderstandingForGenerationOptions
from uae_jax.options.experiment import EvaluationOptions
from uae_jax.rollouts.conditioning import Context
from uae_jax.rollouts.guidance_interval import EVERYWHERE
from uae_jax.rollouts.images import replay, sample_ode, sample_sde, velocity_field
from uae_jax.training.flops import matrix_flops
from uae_jax.training.rl.sde_policy import window_trips
from uae_jax.training.validate import validate
from uae_jax.weights.checkpoint import InferenceSettings

STEPS, SHIFT, GUIDANCE = 8, 3.0, 2.5
LEVELS = samplers.sigmas(STEPS, SHIFT)
# The noise levels are 1, 0.95, 0.89, 0.81, 0.70, 0.55, 0.33 and 0.009: guidance from step 2 to step 5.
INTERVAL = (0.5, 0.9)
GUIDED = [False, False, True, True, True, True, False, False]
NOISE = jax.random.normal(jax.random.key(0), (2, 2, 2, 16))
WEIGHT = jax.random.normal(jax.random.key(1), (16, 16)) / 4
CONTEXT = Context(jnp.asarray([[[0.4]], [[0.9]]]), jnp.ones((2, 1), bool))
NEGATIVE = Context(jnp.asarray([[[-0.7]]]), jnp.ones((1, 1), bool))
SDE = dict(num_steps=STEPS, shift=SHIFT, kind="flow", noise_level=0.7)


def velocity(latents, sigma, states, mask):
  sigma = jnp.reshape(sigma, (-1, 1, 1, 1))
  return jnp.sin(latents @ WEIGHT + sigma) * states[:, :, None, :]


MODEL = types.SimpleNamespace(velocity=velocity)


def field(interval=INTERVAL, repeat=1):
  context = CONTEXT.repeat(repeat)
  return velocity_field(MODEL, context, guidance=GUIDANCE, negative=NEGATIVE, interval=interval)


def euler(latents, steps):
  """Steps written out, each with the branch of `GUIDED`."""
  for step in steps:
    branch = field(EVERYWHERE) if GUIDED[step] else velocity_field(MODEL, CONTEXT)
    latents = samplers.ode_step(latents, branch(latents, LEVELS[step]), LEVELS[step], LEVELS[step + 1])
  return latents


def test_the_gradient_flows_through_both_branches():
  """It is that of finite differences; with the unconditional branch held fixed it is another."""

  def loss(weight, held=None):
    def moved(latents, sigma, states, mask):
      return jnp.sin(latents @ weight + jnp.reshape(sigma, (-1, 1, 1, 1))) * states[:, :, None, :]

    model = types.SimpleNamespace(velocity=moved)
    if held is None:
      found = velocity_field(model, CONTEXT, guidance=GUIDANCE, negative=NEGATIVE)(NOISE, LEVELS[2])
    else:
      positive = moved(NOISE, LEVELS[2], CONTEXT.states, CONTEXT.mask)
      found = held + GUIDANCE * (positive - held)
    return jnp.sum(jnp.square(found))

  with jax.enable_x64(True):
    weight, direction = np.asarray(WEIGHT, np.float64), np.asarray(NOISE[0, 0, 0, :, None] * np.ones(16), np.float64)
    found = np.sum(np.asarray(jax.grad(loss)(weight)) * direction)
    step = 1e-6
    differences = (loss(weight + step * direction) - loss(weight - step * direction)) / (2 * step)
    held = jnp.sin(NOISE @ weight + LEVELS[2]) * NEGATIVE.states[:, :, None, :]
    other = np.sum(np.asarray(jax.grad(loss)(weight, held)) * direction)
  assert found == pytest.approx(float(differences), rel=1e-5)
  assert abs(found - other) > 0.1 * abs(found)


@pytest.mark.parametrize("gradient_steps", [0, 3, STEPS])
def test_an_ode_runs_both_branches_only_inside(gradient_steps):
  sample = functools.partial(sample_ode, num_steps=STEPS, shift=SHIFT, gradient_steps=gradient_steps)
  found = jax.jit(lambda noise: sample(field(), noise))(NOISE)
  np.testing.assert_allclose(found, euler(NOISE, range(STEPS)), atol=1e-5)
  assert np.max(np.abs(found - sample(field(EVERYWHERE), NOISE))) > 1e-2

  def work(interval):
    return matrix_flops(jax.make_jaxpr(lambda noise: sample(field(interval), noise))(NOISE).jaxpr)

  assert work(INTERVAL) / work(EVERYWHERE) == (STEPS + sum(GUIDED)) / (2 * STEPS)


@pytest.mark.parametrize("start", range(5))
def test_windows_on_either_side_and_across_are_replayed(start):
  """The window starts at a traced step; the ODE steps around it have the branch of their own noise level."""
  reach = (0, 6)

  @jax.jit
  def run(noise, start):
    make = functools.partial(field, INTERVAL)
    sampled = sample_sde(
      make, noise, jax.random.key(2), start, num_rollouts=1, is_noise_shared=True, window=2, reach=reach, **SDE
    )
    return sampled, replay(field(), sampled.latents, sampled.steps, reach=reach, **SDE)[0]

  sampled, log_probs = run(NOISE, jnp.int32(start))
  np.testing.assert_allclose(log_probs, sampled.log_probs, rtol=1e-6)
  np.testing.assert_allclose(sampled.latents[0], euler(NOISE, range(start)), atol=1e-5)
  np.testing.assert_allclose(sampled.final, euler(sampled.latents[-1], range(start + 2, STEPS)), atol=1e-5)
  for offset in range(2):
    only = (start + offset, start + offset + 1)
    one = replay(field(), sampled.latents[offset : offset + 2], sampled.steps[offset : offset + 1], reach=only, **SDE)
    np.testing.assert_allclose(one[0][0], sampled.log_probs[offset], rtol=1e-5)


def test_rows_with_noise_levels_of_their_own():
  sigma = jnp.asarray([0.9, 0.95])
  found = field()(NOISE, sigma)
  np.testing.assert_allclose(found[0], field(EVERYWHERE)(NOISE, sigma)[0], atol=1e-6)
  np.testing.assert_allclose(found[1], velocity_field(MODEL, CONTEXT)(NOISE, sigma)[1], atol=1e-6)


@pytest.mark.parametrize(
  ("interval", "expected"),
  [(EVERYWHERE, (2, 4)), (INTERVAL, (2, 0, 2, 2)), ((0.85, 1.0), (2, 0, 0, 4))],
)
def test_a_plan_knows_the_steps_of_every_run(interval, expected):
  """The window is in the middle of its reach, at steps 2 and 3; the loops before it reach to step 4."""
  options = UnderstandingForGenerationOptions(
    guidance=2.0, guidance_interval=interval, sampler_steps=STEPS, window=2, window_range=(0, 5)
  )
  trips = window_trips(options, (8, 8, 16))
  assert trips == expected and sum(trips) == STEPS - 2


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.6, 0.4), (-0.1, 0.5), (0.5, 1.1), (0.5, float("nan"))])
def test_an_interval_that_is_none_is_refused(interval):
  with pytest.raises(ValueError, match="guidance_interval"):
    GenerationOptions(guidance=2.0, guidance_interval=interval)


def test_an_interval_that_guides_nothing_is_refused():
  with pytest.raises(ValueError, match="guidance_interval = .* does nothing with guidance = 1"):
    GenerationOptions(guidance_interval=INTERVAL)
  evaluation = EvaluationOptions(guidance=2.0, guidance_interval=(0.001, 0.005), num_images=0)
  with pytest.raises(ValueError, match=r"config\.evaluation\.guidance_interval = .* contains none of the noise levels"):
    validate(Experiment(evaluation=evaluation, stages=("vae",)))
  with pytest.raises(ValueError, match="contains none of the noise levels"):
    sample_ode(field((0.96, 0.99)), NOISE, num_steps=STEPS, shift=SHIFT)


def test_a_result_records_its_interval_and_one_without_is_of_all_levels():
  model = types.SimpleNamespace(
    inference=InferenceSettings(guidance_interval=INTERVAL), processor=types.SimpleNamespace(negative_prompt="")
  )
  assert settings.images({}, model)["guidance_interval"] == [0.5, 0.9]
  assert settings.images({"guidance": 1.0}, model)["guidance_interval"] == [0.0, 1.0]
  earlier = {"guidance": 5.0}
  assert results.differences(earlier, earlier | {"guidance_interval": [0.0, 1.0]}) == []
  assert results.differences(earlier, earlier | {"guidance_interval": [0.5, 0.9]}) != []
