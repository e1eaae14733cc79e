"""Every flow objective equals its formula in PyTorch, gradient included; microbatches add up exactly."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest
import torch

from uae_jax import sharding
from uae_jax.algorithms import kl, samplers
from uae_jax.algorithms.advantages import group_advantages
from uae_jax.algorithms.flow_grpo import flow_objective
from uae_jax.algorithms.forward_process import ADVANTAGE_MODES, AWM_WEIGHTS, forward_objective
from uae_jax.options import AdvantageOptions, ImageObjective

torch.set_num_threads(1)

PROMPTS, ROLLOUTS, LATENT = 4, 3, (4, 2)
STEPS = np.array([2, 5])
SIGMAS = samplers.sigmas(10).astype(float)
SIGMA, SIGMA_NEXT = SIGMAS[STEPS], SIGMAS[STEPS + 1]
LEVEL = 0.7
CLIP = dict(clip_low=0.01, clip_high=0.02)

GUARD_CLIP = dict(clip_low=5e-4, clip_high=1e-3)

CONFIGURATIONS = {
  "plain clip": ImageObjective(**CLIP),
  "guard clip": ImageObjective(ratio="guard", **GUARD_CLIP),
  "plain divergence": ImageObjective(trust_region="divergence", divergence_threshold=5e-4),
  "guard divergence": ImageObjective(ratio="guard", trust_region="divergence", divergence_threshold=5e-4),
  "tempflow": ImageObjective(step_weight="noise", **CLIP),
  "guard balanced": ImageObjective(ratio="guard", step_weight="inverse_dt", **GUARD_CLIP),
  **{f"{kind} kl": ImageObjective(beta=0.1, kl=kind, **CLIP) for kind in kl.FLOW_KINDS},
}


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def draw(*shape, seed=0, scale=1.0):
  return scale * np.random.default_rng(seed).normal(size=shape)


def make_rollout():
  """Window steps of an old policy, with nearby velocities of the new and the reference policy."""
  shape = (len(STEPS), PROMPTS, ROLLOUTS, *LATENT)
  x, old = draw(*shape), draw(*shape, seed=1)
  mean, std = moments(jnp.asarray(x), jnp.asarray(old))
  after = mean + std.reshape(-1, 1, 1, 1, 1) * draw(*shape, seed=2)
  return dict(
    x=x,
    old=old,
    velocity=old + draw(*shape, seed=3, scale=0.1),
    reference=old + draw(*shape, seed=4, scale=0.1),
    after=np.asarray(after),
    advantages=draw(PROMPTS, ROLLOUTS, seed=5),
  )


def moments(x, velocity):
  return samplers.sde_step("flow", x, velocity, jnp.asarray(SIGMA), jnp.asarray(SIGMA_NEXT), SIGMAS[1], LEVEL)


def log_prob(after, mean, std):
  """`samplers.log_prob` of steps with a common std, with [W, prompts, rollouts] flattened."""
  stds = jnp.repeat(std, after.shape[1] * after.shape[2])
  flat = samplers.log_prob("flow", after.reshape(-1, *LATENT), mean.reshape(-1, *LATENT), stds)
  return flat.reshape(after.shape[:3])


def call(objective, rollout, velocity=None, **changes):
  r = {name: jnp.asarray(value) for name, value in rollout.items()}
  velocity = r["velocity"] if velocity is None else velocity
  (mean, std), (old_mean, _), (reference, _) = (moments(r["x"], v) for v in (velocity, r["old"], r["reference"]))
  arguments = dict(
    log_probs=log_prob(r["after"], mean, std),
    old_log_probs=log_prob(r["after"], old_mean, std),
    advantages=r["advantages"],
    std=std,
    sigma=jnp.asarray(SIGMA),
    sigma_next=jnp.asarray(SIGMA_NEXT),
    mean=mean,
    old_mean=old_mean,
    reference_mean=reference,
    velocity_scale=samplers.velocity_scale("flow", jnp.asarray(SIGMA), jnp.asarray(SIGMA_NEXT), SIGMAS[1], LEVEL),
  )
  return flow_objective(objective, **(arguments | changes))


def torch_loss(o, rollout):
  """(loss, d loss / d velocity), step by step as in the published implementations."""
  t = {name: torch.tensor(value) for name, value in rollout.items()}
  velocity = t["velocity"].requires_grad_()
  losses = []
  stds = [LEVEL * np.sqrt(s / (1 - s)) * np.sqrt(s - n) for s, n in zip(SIGMA, SIGMA_NEXT, strict=True)]
  mean_std = np.mean(stds)
  for i, (sigma, sigma_next) in enumerate(zip(SIGMA, SIGMA_NEXT, strict=True)):
    dt = sigma_next - sigma
    g = LEVEL * np.sqrt(sigma / (1 - sigma))
    s = g * np.sqrt(-dt)

    def mean_of(v, i=i, g=g, sigma=sigma, dt=dt):
      return t["x"][i] * (1 + g**2 / (2 * sigma) * dt) + v[i] * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt

    mean, old, reference = mean_of(velocity), mean_of(t["old"]), mean_of(t["reference"])
    new_log_prob, old_log_prob = (
      torch.distributions.Normal(m, s).log_prob(t["after"][i]).mean((2, 3)) for m in (mean, old)
    )
    difference = new_log_prob - old_log_prob
    divergence = ((mean - old) ** 2).mean((2, 3)) / (2 * s**2)
    ratio = torch.exp((difference + divergence) * s if o.ratio == "guard" else difference)
    a = t["advantages"]
    if o.trust_region == "clip":
      loss = torch.max(-a * ratio, -a * ratio.clamp(1 - o.clip_range[0], 1 + o.clip_range[1]))
    else:
      blocked = (divergence >= o.divergence_threshold) & (((a > 0) & (ratio > 1)) | ((a < 0) & (ratio < 1)))
      loss = -a * ratio * ~blocked
    loss = loss * {"uniform": 1, "noise": s / mean_std, "inverse_dt": -1 / dt}[o.step_weight]
    square = ((mean - reference) ** 2).mean((2, 3))
    divergences = {
      "gaussian": square / (2 * s**2),
      "gaussian_no_dt": square / (2 * g**2),
      "velocity": ((velocity[i] - t["reference"][i]) ** 2).mean((2, 3)),
      "mean": square,
    }
    losses.append((loss + o.beta * divergences[o.kl]).mean())
  loss = sum(losses) / len(losses)
  loss.backward()
  return loss.item(), velocity.grad.numpy()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_value_and_gradient_equal_torch(name):
  objective, rollout = CONFIGURATIONS[name], make_rollout()
  expected, expected_gradient = torch_loss(objective, rollout)

  def loss(velocity):
    return call(objective, rollout, velocity)[0].mean

  value, gradient = jax.value_and_grad(loss)(jnp.asarray(rollout["velocity"]))
  assert float(value) == pytest.approx(expected, rel=1e-9)
  np.testing.assert_allclose(gradient, expected_gradient, atol=1e-12)


def test_the_cases_clip_and_mask_something():
  """Otherwise the test above would also pass for an objective without a trust region."""
  for name in ("plain clip", "guard clip", "plain divergence", "guard divergence"):
    total, count = call(CONFIGURATIONS[name], make_rollout())[1]["clip_fraction"]
    assert 0 < total < count, name


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_micro_batches_add_to_the_batch(name):
  objective, rollout = CONFIGURATIONS[name], make_rollout()
  loss, metrics = call(objective, rollout)

  def microbatch(i):
    return {key: value[i : i + 1] if key == "advantages" else value[:, i : i + 1] for key, value in rollout.items()}

  microbatches = [call(objective, microbatch(i)) for i in range(PROMPTS)]
  assert float(sum(p.sum for p, _ in microbatches)) == pytest.approx(float(loss.sum), rel=1e-10)
  assert float(sum(p.count for p, _ in microbatches)) == float(loss.count) == len(STEPS) * PROMPTS * ROLLOUTS
  for metric, (total, count) in metrics.items():
    assert float(sum(m[metric][0] for _, m in microbatches)) == pytest.approx(float(total), rel=1e-9, abs=1e-12)
    assert float(sum(m[metric][1] for _, m in microbatches)) == float(count)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_before_the_first_update_the_ratio_is_one_and_the_kl_zero(name):
  objective, rollout = CONFIGURATIONS[name], make_rollout()
  placed = jax.NamedSharding(sharding.make_mesh(data=4, fsdp=2), PartitionSpec(None, "data"))

  @jax.jit
  def metrics_of(x, velocity, old, reference):
    return call(objective, rollout | dict(x=x, old=old, reference=reference), velocity)[1]

  x, velocity = jnp.float32(rollout["x"]), jnp.float32(rollout["velocity"])
  for place in (lambda x: x, lambda x: jax.device_put(x, placed)):
    metrics = metrics_of(place(x), *(place(velocity + 0) for _ in range(3)))
    assert metrics["ratio_mean"][0] == metrics["ratio_mean"][1] == len(STEPS) * PROMPTS * ROLLOUTS
    for metric in ("ratio_variance", "approximate_kl", "clip_fraction", "log_ratio_abs", "kl"):
      assert metrics.get(metric, (0, 0))[0] == 0


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_equal_rewards_give_no_policy_gradient(name):
  objective, rollout = dataclasses.replace(CONFIGURATIONS[name], beta=0.0, kl=ImageObjective().kl), make_rollout()
  rollout["advantages"] = group_advantages(jnp.full((PROMPTS, ROLLOUTS), 0.3), AdvantageOptions())
  gradient = jax.grad(lambda v: call(objective, rollout, v)[0].sum)(jnp.asarray(rollout["velocity"]))
  np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_order_inside_a_group_does_not_matter(name):
  objective, rollout, order = CONFIGURATIONS[name], make_rollout(), [2, 0, 1]
  permuted = {key: value[:, order] if key == "advantages" else value[:, :, order] for key, value in rollout.items()}
  assert float(call(objective, permuted)[0].mean) == pytest.approx(float(call(objective, rollout)[0].mean), rel=1e-12)


def test_ratio_norm_is_the_centred_log_ratio():
  """(D + b) s = mean((mu - mu_old) z), where z is the drawn noise."""
  rollout = make_rollout()
  (mean, std), (old_mean, _) = (moments(rollout["x"], rollout[name]) for name in ("velocity", "old"))
  z = (rollout["after"] - old_mean) / std.reshape(-1, 1, 1, 1, 1)
  expected = jnp.exp(((mean - old_mean) * z).mean((3, 4)))
  total, _ = call(ImageObjective(ratio="guard"), rollout)[1]["ratio_mean"]
  assert float(total) == pytest.approx(float(expected.sum()), rel=1e-12)


def test_metrics_of_single_steps_add_to_the_whole():
  _, metrics = call(CONFIGURATIONS["plain clip"], make_rollout())
  for name in ("ratio_mean", "ratio_variance", "clip_fraction", "log_ratio_abs"):
    parts = [metrics[f"{name}_step{i}"] for i in range(len(STEPS))]
    assert float(sum(total for total, _ in parts)) == pytest.approx(float(metrics[name][0]), rel=1e-12)


@pytest.mark.parametrize(
  "refused",
  [
    lambda: ImageObjective(ratio="norm"),
    lambda: call(ImageObjective(ratio="guard"), make_rollout(), old_mean=None),
    lambda: call(ImageObjective(trust_region="divergence"), make_rollout(), old_mean=None),
    lambda: call(ImageObjective(beta=0.1), make_rollout(), reference_mean=None),
    lambda: call(ImageObjective(beta=0.1, kl="velocity"), make_rollout(), velocity_scale=None),
    lambda: ImageObjective(loss="dpo"),
    lambda: call(ImageObjective(loss="nft"), make_rollout()),
    lambda: forward(ImageObjective(), make_samples()),
    lambda: forward(ImageObjective(loss="nft", beta=0.1), make_samples(), reference_velocity=None),
    lambda: forward(ImageObjective(loss="nft", average_beta=0.1), make_samples(), average_velocity=None),
  ],
)
def test_wrong_options_are_refused(refused):
  with pytest.raises(ValueError, match="expected|need"):
    refused()


def make_samples():
  shape = (6, *LATENT)
  old = draw(*shape)
  return dict(
    velocity=old + draw(*shape, seed=1, scale=0.2),
    old_velocity=old,
    reference_velocity=old + draw(*shape, seed=2, scale=0.2),
    average_velocity=old + draw(*shape, seed=6, scale=0.2),
    x=draw(*shape, seed=3),
    noise=draw(*shape, seed=4),
    sigma=np.linspace(0.1, 0.9, 6),
    advantages=draw(6, seed=5, scale=3.0),
  )


def forward(objective, samples, velocity=None, **changes):
  arguments = {name: jnp.asarray(value) for name, value in samples.items()} | changes
  if velocity is not None:
    arguments["velocity"] = velocity
  return forward_objective(objective, **arguments)


def torch_forward_loss(o, samples):
  t = {name: torch.tensor(value) for name, value in samples.items()}
  v = t["velocity"].requires_grad_()
  old, x0, noise, a = t["old_velocity"], t["x"], t["noise"], t["advantages"]
  sigma = t["sigma"].reshape(-1, 1, 1)
  if o.loss == "nft":
    noised = (1 - sigma) * x0 + sigma * noise
    losses = []
    for mixed in (o.mix * v + (1 - o.mix) * old, (1 + o.mix) * old - o.mix * v):
      prediction = noised - sigma * mixed
      with torch.no_grad():
        weight = (prediction - x0).abs().mean((1, 2), keepdim=True).clamp(min=1e-5)
      losses.append(((prediction - x0) ** 2 / weight).mean((1, 2)))
    a = a.clamp(-o.max_advantage, o.max_advantage)
    a = {
      "all": a,
      "positive_only": a * (a > 0),
      "negative_only": a * (a < 0),
      "one_only": (a > 0).double(),
      "binary": torch.sign(a),
    }[o.advantage_mode]
    p = (a / o.max_advantage / 2 + 0.5).clamp(0, 1)
    loss = (p * losses[0] + (1 - p) * losses[1]) * o.max_advantage / o.mix
  else:

    def log_prob(v):
      error = ((v - (noise - x0)) ** 2).mean((1, 2))
      if o.weight == "huber":
        return -(torch.sqrt(error + 1e-10) - 1e-5) * t["sigma"]
      if o.weight == "ghuber":
        return -((error + 1e-10) ** 0.25 - 1e-10**0.25) * t["sigma"] / 0.25
      return -error * t["sigma"] ** {"uniform": 0, "sigma": 1, "sigma_square": 2}[o.weight]

    ratio = torch.exp(log_prob(v) - log_prob(old))
    loss = torch.max(-a * ratio, -a * ratio.clamp(1 - o.clip_range[0], 1 + o.clip_range[1]))
  for beta, name in ((o.average_beta, "average_velocity"), (o.beta, "reference_velocity")):
    loss = loss + beta * ((v - t[name]) ** 2).mean((1, 2))
  loss.mean().backward()
  return loss.mean().item(), v.grad.numpy()


FORWARD = {
  "nft": ImageObjective(loss="nft"),
  **{f"nft {mode}": ImageObjective(loss="nft", advantage_mode=mode, max_advantage=2.0) for mode in ADVANTAGE_MODES[1:]},
  "nft half": ImageObjective(loss="nft", mix=0.5, beta=0.1),
  **{
    f"awm {weight}": ImageObjective(loss="awm", weight=weight, clip_low=0.05, clip_high=0.05) for weight in AWM_WEIGHTS
  },
  "awm with kl": ImageObjective(loss="awm", average_beta=1.0, beta=1e-2),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_objectives_equal_torch_and_add_over_microbatches(name):
  objective, samples = FORWARD[name], make_samples()
  expected, expected_gradient = torch_forward_loss(objective, samples)

  def loss(velocity):
    return forward(objective, samples, velocity)[0].mean

  value, gradient = jax.value_and_grad(loss)(jnp.asarray(samples["velocity"]))
  assert float(value) == pytest.approx(expected, rel=1e-10)
  np.testing.assert_allclose(gradient, expected_gradient, atol=1e-12)
  microbatches = [forward(objective, {k: v[i : i + 2] for k, v in samples.items()})[0] for i in (0, 2, 4)]
  assert float(sum(p.sum for p in microbatches) / sum(p.count for p in microbatches)) == pytest.approx(
    expected, rel=1e-10
  )


@pytest.mark.parametrize("name", FORWARD)
def test_forward_objectives_are_still_where_advantages_and_distances_are_zero(name):
  """At v = v_old = v_ref with zero advantage the gradient vanishes: NFT's two halves cancel, AWM has none."""
  samples = make_samples()
  samples["old_velocity"] = samples["reference_velocity"] = samples["average_velocity"] = samples["velocity"]
  samples["advantages"] = np.zeros(6)
  gradient = jax.grad(lambda v: forward(FORWARD[name], samples, v)[0].sum)(jnp.asarray(samples["velocity"]))
  np.testing.assert_allclose(gradient, 0, atol=1e-14)


@pytest.mark.parametrize("name", FORWARD)
def test_forward_ratio_is_one_and_distances_zero_before_the_first_update(name):
  samples = make_samples()

  @jax.jit
  def metrics_of(velocity, *others):
    names = ("old_velocity", "average_velocity", "reference_velocity")
    return forward(FORWARD[name], samples | dict(zip(names, others, strict=True)), velocity)[1]

  velocity = jnp.float32(samples["velocity"])
  placed = jax.NamedSharding(sharding.make_mesh(data=2, fsdp=4), PartitionSpec("data"))
  for place in (lambda x: x, lambda x: jax.device_put(x, placed)):
    metrics = metrics_of(*(place(velocity + 0) for _ in range(4)))
    for metric in ("old_distance", "average_distance", "kl", "approximate_kl", "ratio_variance", "clip_fraction"):
      assert metrics.get(metric, (0, 0))[0] == 0
    assert metrics.get("ratio_mean", (6, 6))[0] == 6
