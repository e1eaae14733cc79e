"""Interpolation, targets, noise levels and the flow loss equal their equations and diffusers' training helpers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from uae_jax.algorithms import flow_matching

torch.set_num_threads(1)


def draw(*shape, seed=0):
  return jnp.float32(np.random.default_rng(seed).normal(size=shape))


def test_path_runs_from_data_to_noise_with_the_target_as_velocity():
  x, noise = draw(3, 4, 4, 2), draw(3, 4, 4, 2, seed=1)
  np.testing.assert_array_equal(flow_matching.interpolate(x, noise, jnp.zeros(3)), x)
  np.testing.assert_array_equal(flow_matching.interpolate(x, noise, jnp.ones(3)), noise)
  sigma = jnp.float32([0.2, 0.5, 0.9])
  _, velocity = jax.jvp(lambda s: flow_matching.interpolate(x, noise, s), (sigma,), (jnp.ones(3),))
  np.testing.assert_allclose(velocity, flow_matching.velocity_target(x, noise), atol=1e-6)


def test_shifted_logit_normal_has_the_quantiles_of_the_formula():
  sigma = flow_matching.sample_sigmas(jax.random.key(0), (20000,), mean=0.3, std=0.8, shift=3.0)
  for quantile, z in ((0.1, -1.2816), (0.5, 0.0), (0.9, 1.2816)):
    u = 1 / (1 + np.exp(-(0.3 + 0.8 * z)))
    assert float(jnp.quantile(sigma, quantile)) == pytest.approx(3 * u / (1 + 2 * u), abs=0.01)


@pytest.mark.parametrize("density", flow_matching.DENSITIES)
def test_densities_stay_inside_and_are_symmetric_without_shift(density):
  sigma = flow_matching.sample_sigmas(jax.random.key(1), (20000,), density=density, shift=1.0)
  assert 0 <= float(sigma.min()) and float(sigma.max()) <= 1
  if density != "mode":
    assert float(sigma.mean()) == pytest.approx(0.5, abs=0.01)


def test_mode_density_equals_diffusers_formula():
  u = jax.random.uniform(jax.random.key(2), (100,))
  expected = 1 - u - 1.29 * (jnp.cos(jnp.pi * u / 2) ** 2 - 1 + u)
  actual = flow_matching.sample_sigmas(jax.random.key(2), (100,), density="mode", shift=1.0)
  np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_shifts_compose():
  sigma = jnp.linspace(0.01, 0.99, 9)
  twice = flow_matching.shift_sigmas(flow_matching.shift_sigmas(sigma, 2.0), 1.5)
  np.testing.assert_allclose(twice, flow_matching.shift_sigmas(sigma, 3.0), rtol=1e-6)


def test_guidance_interpolates_and_extrapolates():
  negative, positive = draw(2, 3), draw(2, 3, seed=1)
  np.testing.assert_array_equal(flow_matching.apply_guidance(negative, positive, 0.0), negative)
  np.testing.assert_allclose(flow_matching.apply_guidance(negative, positive, 1.0), positive, atol=1e-6)
  expected = negative + 5 * (positive - negative)
  np.testing.assert_allclose(flow_matching.apply_guidance(negative, positive, 5.0), expected, atol=1e-6)
