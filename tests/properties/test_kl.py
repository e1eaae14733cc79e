"""KL estimators, the exact KL, Gaussian KLs and moving averages equal PyTorch's distributions and formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from uae_jax.algorithms import ema, kl, samplers

torch.set_num_threads(1)

SIGMAS = samplers.sigmas(10).astype(float)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


def test_exact_kl_equals_torch_with_gradient():
  ours, theirs = draw(2, 3, 7), draw(2, 3, 7, seed=1)
  logits = torch.tensor(ours, requires_grad=True)
  distributions = [torch.distributions.Categorical(logits=x) for x in (logits, torch.tensor(theirs))]
  expected = torch.distributions.kl_divergence(*distributions)
  expected.sum().backward()
  np.testing.assert_allclose(kl.exact(jnp.asarray(ours), jnp.asarray(theirs)), expected.detach().numpy(), rtol=1e-12)
  gradient = jax.grad(lambda x: kl.exact(x, jnp.asarray(theirs)).sum())(jnp.asarray(ours))
  np.testing.assert_allclose(gradient, logits.grad.numpy(), atol=1e-12)


def test_estimators_average_to_the_exact_kl():
  logits, reference = jnp.asarray(draw(7)), jnp.asarray(draw(7, seed=1))
  log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
  for kind in ("k1", "k3"):
    mean = jnp.sum(jnp.exp(log_p) * kl.estimate(kind, log_p, log_q))
    np.testing.assert_allclose(mean, kl.exact(logits, reference), rtol=1e-10)
  near = jax.nn.log_softmax(logits + 1e-4 * draw(7, seed=2))
  second_order = jnp.sum(jnp.exp(log_p) * kl.estimate("k2", log_p, near))
  np.testing.assert_allclose(second_order, jnp.sum(jnp.exp(log_p) * (log_p - near)), rtol=1e-3)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_estimators_are_zero_at_equality_and_finite_far_away(kind):
  log_probs = jnp.float32([-0.5, -3.0])
  np.testing.assert_array_equal(kl.estimate(kind, log_probs, log_probs), 0)
  far = jnp.float32([-200.0, 0.0])
  assert np.isfinite(kl.estimate(kind, far, far[::-1])).all()
  assert np.isfinite(jax.grad(lambda x: kl.estimate(kind, x, far[::-1]).sum())(far)).all()
  if kind != "k1":
    assert (kl.estimate(kind, log_probs, log_probs + jnp.float32([1e-3, -1e-3])) > 0).all()


def gradient_of(divergence, logits):
  """d divergence / d logits of a function of log-probabilities, by PyTorch."""
  logits = torch.tensor(logits, requires_grad=True)
  divergence(torch.log_softmax(logits, -1)).backward()
  return logits.grad.numpy()


@pytest.mark.parametrize("is_on_policy", [True, False])
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_weighted_estimators_have_the_expected_gradient_of_the_kl(kind, is_on_policy):
  """Exact expectation over 11 tokens sampled by the policy itself, or by an older one."""
  logits, reference = 0.7 * draw(11), 0.7 * draw(11, seed=1)
  old = jax.nn.log_softmax(jnp.asarray(logits if is_on_policy else logits + 0.5 * draw(11, seed=2)))
  log_reference = jax.nn.log_softmax(jnp.asarray(reference))

  def expected_loss(logits):
    log_p = jax.nn.log_softmax(logits)
    estimate = kl.estimate(kind, log_p, log_reference)
    return jnp.sum(jnp.exp(old) * kl.weighted(kind, estimate, jnp.exp(log_p - old)))

  q = torch.log_softmax(torch.tensor(reference), -1)
  expected = gradient_of(lambda p: (p.exp() * (p - q)).sum(), logits)
  np.testing.assert_allclose(jax.grad(expected_loss)(jnp.asarray(logits)), expected, atol=1e-12)


def test_the_plain_estimators_have_other_gradients_on_policy():
  """That of k1 is zero, that of k3 is the gradient of the reversed KL; only k2 needs no weight."""
  logits, reference = 0.7 * draw(11), 0.7 * draw(11, seed=1)
  log_reference = jax.nn.log_softmax(jnp.asarray(reference))
  p_old = jnp.exp(jax.nn.log_softmax(jnp.asarray(logits)))
  q = torch.log_softmax(torch.tensor(reference), -1)
  forward = gradient_of(lambda p: (p.exp() * (p - q)).sum(), logits)
  reverse = gradient_of(lambda p: (q.exp() * (q - p)).sum(), logits)
  assert np.linalg.norm(forward - reverse) > 0.3 * np.linalg.norm(forward)
  for kind, expected in (("k1", np.zeros(11)), ("k2", forward), ("k3", reverse)):
    found = jax.grad(lambda x, kind=kind: jnp.sum(p_old * kl.estimate(kind, jax.nn.log_softmax(x), log_reference)))
    np.testing.assert_allclose(found(jnp.asarray(logits)), expected, atol=1e-12)


@pytest.mark.parametrize("sampler", samplers.KINDS)
def test_flow_kls(sampler):
  steps = np.array([2, 5])
  sigma, sigma_next = jnp.asarray(SIGMAS[steps]), jnp.asarray(SIGMAS[steps + 1])
  x, v, v_reference = (draw(2, 3, 4, 5, 2, seed=seed) for seed in range(3))

  def moments(v):
    return samplers.sde_step(sampler, x, v, sigma, sigma_next, SIGMAS[1], 0.6)

  (mean, std), (reference, _) = moments(v), moments(v_reference)
  change = sigma_next - sigma
  scale = samplers.velocity_scale(sampler, sigma, sigma_next, SIGMAS[1], 0.6)
  options = dict(std=std, change=change, velocity_scale=scale)

  gaussians = [
    torch.distributions.Normal(torch.tensor(np.asarray(m)), torch.tensor(np.asarray(std)).reshape(2, 1, 1, 1, 1))
    for m in (mean, reference)
  ]
  exact = torch.distributions.kl_divergence(*gaussians).mean((3, 4)).numpy()
  np.testing.assert_allclose(kl.flow("gaussian", mean, reference, **options), exact, rtol=1e-10)
  without_dt = exact * -np.asarray(change).reshape(2, 1, 1)
  np.testing.assert_allclose(kl.flow("gaussian_no_dt", mean, reference, **options), without_dt, rtol=1e-10)
  velocity = ((v - v_reference) ** 2).mean((3, 4))
  np.testing.assert_allclose(kl.flow("velocity", mean, reference, **options), velocity, rtol=1e-9)
  plain = ((np.asarray(mean) - np.asarray(reference)) ** 2).mean((3, 4))
  np.testing.assert_allclose(kl.flow("mean", mean, reference, **options), plain, rtol=1e-10)
  for kind in kl.FLOW_KINDS:
    np.testing.assert_array_equal(kl.flow(kind, mean, mean, **options), 0)


def test_velocity_kl_needs_its_scale():
  with pytest.raises(ValueError, match="velocity_scale"):
    kl.flow("velocity", jnp.zeros((1, 1, 1, 2)), jnp.zeros((1, 1, 1, 2)), std=jnp.ones(1), change=-jnp.ones(1))


def test_moving_average():
  average = {"a": {"b": jnp.float32([1.0, 2.0])}, "c": jnp.bfloat16(1.0)}
  params = {"a": {"b": jnp.float32([3.0, 2.0])}, "c": jnp.bfloat16(2.0)}
  updated = ema.update(average, params, 0.75)
  np.testing.assert_array_equal(updated["a"]["b"], jnp.float32([1.5, 2.0]))
  assert updated["c"].dtype == jnp.bfloat16 and float(updated["c"]) == 1.25
  np.testing.assert_array_equal(ema.update(average, params, 0.0)["a"]["b"], params["a"]["b"])
  assert [float(ema.warmup_decay(n, 0.9)) for n in (0, 8, 1000)] == pytest.approx([0.1, 0.5, 0.9])
  assert [float(ema.linear_decay(n, 0.001, 0.5)) for n in (0, 100, 1000)] == pytest.approx([0.0, 0.1, 0.5])
  # Decay type 2 of DiffusionNFT: a copy for 75 steps, then up to 0.999.
  delayed = [float(ema.linear_decay(n, 0.0075, 0.999, 75)) for n in (0, 74, 75, 76, 175, 500)]
  assert delayed == pytest.approx([0.0, 0.0, 0.0, 0.0075, 0.75, 0.999])
