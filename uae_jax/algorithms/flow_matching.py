"""Rectified flow: straight paths from data (sigma = 0) to noise (sigma = 1), and regression on their velocity.

    x_sigma = (1 - sigma) x + sigma noise        d x_sigma / d sigma = noise - x

Source: Stable Diffusion 3 (arXiv 2403.03206 section 2, 3.1, 5.3.2); diffusers 0.42 training_utils.py and
train_dreambooth_sd3.py.
"""

import math

import jax
import jax.numpy as jnp

from uae_jax.algorithms.losses import expand, require

DENSITIES = ("logit_normal", "mode", "uniform")


def interpolate(x: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
  """(1 - sigma) x + sigma noise.

  Args:
    x: float32[batch, ...], data.
    noise: float32[batch, ...], standard normal.
    sigma: float32[] or float32[batch], in [0, 1].
  """
  sigma = expand(sigma, x)
  return (1 - sigma) * x + sigma * noise


def velocity_target(x: jax.Array, noise: jax.Array) -> jax.Array:
  """noise - x, the regression target of the decoder."""
  return noise - x


def shift_sigmas(sigma: jax.Array, shift: float) -> jax.Array:
  """shift sigma / (1 + (shift - 1) sigma); shifts compose by multiplication. Source: arXiv 2403.03206 equation 23."""
  return shift * sigma / (1 + (shift - 1) * sigma)


def sample_sigmas(
  key: jax.Array,
  shape: tuple[int, ...],
  *,
  density: str = "logit_normal",
  mean: float = 0.0,
  std: float = 1.0,
  mode_scale: float = 1.29,
  shift: float = 3.0,
) -> jax.Array:
  """Samples noise levels for training; the shift is applied after sampling.

      logit_normal   u = sigmoid(mean + std z)
      mode           u = 1 - w - s (cos^2(pi w / 2) - 1 + w),  w uniform
      uniform        u = w

  Source: arXiv 2403.03206 section 3.1; diffusers 0.42 compute_density_for_timestep_sampling (which then rounds u to a
  thousandth).

  Args:
    key: typed PRNG key.
    shape: shape of the result.
    density: density of u before the shift, one of `DENSITIES`.
    mean: mean of the logit, for "logit_normal".
    std: standard deviation of the logit, for "logit_normal".
    mode_scale: s, for "mode"; positive values favor the middle.
    shift: see `shift_sigmas`; 1 disables the shift.

  Returns:
    float32[shape] in (0, 1).
  """
  require("density", density, DENSITIES)
  if density == "logit_normal":
    u = jax.nn.sigmoid(mean + std * jax.random.normal(key, shape))
  else:
    u = jax.random.uniform(key, shape)
    if density == "mode":
      u = 1 - u - mode_scale * (jnp.square(jnp.cos(math.pi * u / 2)) - 1 + u)
  return shift_sigmas(u, shift)


def apply_guidance(negative: jax.Array, positive: jax.Array, guidance: float) -> jax.Array:
  """Classifier-free guidance, v_neg + guidance (v_pos - v_neg). Source: arXiv 2207.12598, in the form of diffusers."""
  return negative + guidance * (positive - negative)
