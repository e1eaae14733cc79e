"""The schedule equals diffusers' bit for bit; the stochastic step equals the published formulas."""

import math

from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from uae_jax.algorithms import samplers
from uae_jax.options import EvaluationOptions, PretrainOptions

torch.set_num_threads(1)

SIGMAS = samplers.sigmas(10)
LEVELS = {"flow": 0.7, "dance": 0.3, "cps": 0.8}


@pytest.fixture
def float64():
  with jax.enable_x64(True):
    yield


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("shift", [1.0, 2.5, 3.0])
def test_sigmas_equal_diffusers_bit_for_bit(shift):
  for num_steps in range(1, 61):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    np.testing.assert_array_equal(samplers.sigmas(num_steps, shift), scheduler.sigmas.numpy())


def torch_moments(kind, x, v, sigma, sigma_next, level):
  """Mean and std as in the published implementations."""
  change = sigma_next - sigma
  if kind == "cps":
    std = sigma_next * math.sin(level * math.pi / 2)
    clean, noise = x - sigma * v, x + (1 - sigma) * v
    return (1 - sigma_next) * clean + math.sqrt(sigma_next**2 - std**2) * noise, std
  g = level
  if kind == "flow":
    g = math.sqrt(sigma / (1 - (SIGMAS[1].item() if sigma == 1 else sigma))) * level
  mean = x * (1 + g**2 / (2 * sigma) * change) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * change
  return mean, g * math.sqrt(-change)


@pytest.mark.parametrize("latents", [(32, 32), (64, 64), (48, 80), (96, 32), (128, 128)])
def test_the_shift_by_size_is_that_of_diffusers(latents):
  options = PretrainOptions(is_shift_by_size=True)
  assert options.shift_at((*latents, 16)) == pytest.approx(math.exp(calculate_shift(latents[0] * latents[1] // 4)))
  assert PretrainOptions().shift_at((*latents, 16)) == 3.0
  with pytest.raises(ValueError, match="shift = 2.0 does nothing with is_shift_by_size = True"):
    EvaluationOptions(is_shift_by_size=True, shift=2.0)


@pytest.mark.parametrize("kind", samplers.KINDS)
def test_step_and_log_prob_equal_the_published_formulas(kind, float64):
  x, v, noise = draw(3, 4, 4, 2), draw(3, 4, 4, 2, seed=1), draw(3, 4, 4, 2, seed=2)
  for step in (0, 4, 8):
    sigma, sigma_next = SIGMAS[step].item(), SIGMAS[step + 1].item()
    velocity = torch.tensor(v, requires_grad=True)
    mean, std = torch_moments(kind, torch.tensor(x), velocity, sigma, sigma_next, LEVELS[kind])
    after = (mean + std * torch.tensor(noise)).detach()
    if kind == "cps":
      expected = -((after - mean) ** 2).mean((1, 2, 3))
    else:
      expected = torch.distributions.Normal(mean, std).log_prob(after).mean((1, 2, 3))
    (gradient,) = torch.autograd.grad(expected.sum(), velocity)

    def log_prob(v, x=x, sigma=sigma, sigma_next=sigma_next, after=after):
      moments = samplers.sde_step(kind, x, v, sigma, sigma_next, SIGMAS[1].item(), LEVELS[kind])
      return samplers.log_prob(kind, jnp.asarray(after.numpy()), *moments), moments

    actual, (our_mean, our_std) = log_prob(jnp.asarray(v))
    np.testing.assert_allclose(our_mean, mean.detach().numpy(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(our_std, std, rtol=1e-12)
    np.testing.assert_allclose(actual, expected.detach().numpy(), rtol=1e-10)
    np.testing.assert_allclose(jax.grad(lambda v: log_prob(v)[0].sum())(jnp.asarray(v)), gradient.numpy(), atol=1e-11)


@pytest.mark.parametrize("kind", samplers.KINDS)
def test_no_noise_is_the_ode_bit_for_bit(kind):
  x, v = jnp.float32(draw(2, 4, 4, 2)), jnp.float32(draw(2, 4, 4, 2, seed=1))
  for sigma, sigma_next in zip(SIGMAS[:-1], SIGMAS[1:], strict=True):
    mean, std = samplers.sde_step(kind, x, v, jnp.asarray(sigma), jnp.asarray(sigma_next), SIGMAS[1], 0.0)
    np.testing.assert_array_equal(mean, samplers.ode_step(x, v, jnp.asarray(sigma), jnp.asarray(sigma_next)))
    assert std == 0


@pytest.mark.parametrize("kind", samplers.KINDS)
def test_sigma_may_be_traced_and_differ_by_sample(kind):
  x, v = jnp.float32(draw(3, 4, 4, 2)), jnp.float32(draw(3, 4, 4, 2, seed=1))
  step = jax.jit(lambda sigma, sigma_next: samplers.sde_step(kind, x, v, sigma, sigma_next, SIGMAS[1], LEVELS[kind]))
  mean, std = step(SIGMAS[:3], SIGMAS[1:4])
  log_prob = samplers.log_prob(kind, x, mean, std)
  assert std.shape == log_prob.shape == (3,)
  for i in range(3):
    one, one_std = samplers.sde_step(
      kind, x[i : i + 1], v[i : i + 1], SIGMAS[i], SIGMAS[i + 1], SIGMAS[1], LEVELS[kind]
    )
    np.testing.assert_allclose(mean[i : i + 1], one, atol=1e-6)
    np.testing.assert_allclose(log_prob[i : i + 1], samplers.log_prob(kind, x[i : i + 1], one, one_std), rtol=1e-5)


@pytest.mark.parametrize("kind", samplers.KINDS)
def test_velocity_scale_is_the_derivative_of_the_mean(kind):
  x = jnp.float32(draw(1, 5))
  for step in (0, 3, 8):
    arguments = (jnp.asarray(SIGMAS[step]), jnp.asarray(SIGMAS[step + 1]), SIGMAS[1], LEVELS[kind])

    def mean(v, arguments=arguments):
      return samplers.sde_step(kind, x, v, *arguments)[0]

    _, change = jax.jvp(mean, (x,), (jnp.ones_like(x),))
    np.testing.assert_allclose(change, jnp.full_like(x, samplers.velocity_scale(kind, *arguments)), rtol=1e-5)


@pytest.mark.parametrize("kind", ["flow", "dance"])
def test_many_small_steps_arrive_at_the_data_distribution(kind, float64):
  """For Gaussian data of variance d the exact velocity is linear, so the variance of a sampler is known exactly."""
  d = 0.25
  schedule = samplers.sigmas(2000).astype(float)
  sigma, sigma_next = schedule[:-1], schedule[1:]
  slope = (sigma - (1 - sigma) * d) / ((1 - sigma) ** 2 * d + sigma**2)
  gains, stds = samplers.sde_step(
    kind, np.ones((2000, 1)), slope[:, None], sigma, sigma_next, schedule[1], LEVELS[kind]
  )
  variance = 1.0
  for gain, std in zip(np.asarray(gains)[:, 0], np.asarray(stds), strict=True):
    variance = gain**2 * variance + std**2
  assert variance == pytest.approx(d, rel=0.02)


def test_cps_preserves_the_coefficients_of_data_and_noise(float64):
  """With the true velocity, x' = (1 - sigma') x + noise of variance sigma'^2, for any number of steps."""
  x, noise = draw(4, 3), draw(4, 3, seed=1)
  for sigma, sigma_next in ((1.0, 0.9), (0.6, 0.3), (0.3, 0.0)):
    mean, std = samplers.sde_step("cps", (1 - sigma) * x + sigma * noise, noise - x, sigma, sigma_next, 0.9, 0.8)
    kept = np.sqrt(sigma_next**2 - float(std) ** 2)
    np.testing.assert_allclose(mean, (1 - sigma_next) * x + kept * noise, atol=1e-12)


def test_stds_have_the_published_mean():
  """TempFlow-GRPO's constant 2.25 for 10 steps at a = 0.7 is the inverse of this mean."""
  assert 1 / float(samplers.mean_std("flow", SIGMAS, 0.7)) == pytest.approx(2.25, abs=0.01)


def test_log_prob_gives_no_gradient_to_the_sample():
  gradient = jax.grad(lambda x: samplers.log_prob("flow", x, jnp.zeros_like(x), jnp.float32(0.5)).sum())(
    jnp.ones((2, 3))
  )
  np.testing.assert_array_equal(gradient, 0)


def test_windows():
  starts = {int(samplers.sde_window(jax.random.key(i), (1, 5), "random")) for i in range(60)}
  assert starts == {1, 2, 3, 4}
  progressive = [int(samplers.sde_window(i, (1, 5), "progressive", stride=2, hold=3)) for i in range(8)]
  assert progressive == [1, 1, 1, 3, 3, 3, 1, 1]
  assert int(jax.jit(lambda i: samplers.sde_window(i, (1, 5), "progressive"))(6)) == 3
  assert (
    int(samplers.sde_window(0, (2, 3), "fixed")) == int(samplers.sde_window(jax.random.key(0), (2, 3), "fixed")) == 2
  )


@pytest.mark.parametrize(
  "call",
  [
    lambda: samplers.sde_window(0, (0, 4), "random"),
    lambda: samplers.sde_window(jax.random.key(0), (0, 4), "progressive"),
    lambda: samplers.sde_window(0, (4, 4), "fixed"),
    lambda: samplers.sde_window(0, (0, 4), "sliding"),
    lambda: samplers.pull_and_std("ode", 0.5, 0.4, 0.9, 0.7),
    lambda: samplers.pull_and_std("cps", 0.5, 0.4, 0.9, 1.2),
  ],
)
def test_wrong_options_are_refused(call):
  with pytest.raises(ValueError, match="window|sampler"):
    call()
