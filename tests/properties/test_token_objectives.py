"""Every token objective equals its formula in PyTorch loops, gradient included; microbatches add up exactly."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest
import torch

from uae_jax import sharding
from uae_jax.algorithms import grpo, kl
from uae_jax.algorithms.advantages import group_advantages
from uae_jax.algorithms.grpo import token_objective
from uae_jax.options import AdvantageOptions, TokenObjective
from uae_jax.options.objectives import TOKEN_LOSSES

torch.set_num_threads(1)

PROMPTS, ROLLOUTS, TOKENS = 4, 3, 6

CONFIGURATIONS = {
  **{loss: TokenObjective(loss=loss) for loss in TOKEN_LOSSES if loss != "luspo"},
  "luspo": TokenObjective(loss="luspo", importance_level="sequence", clip_low=2e-3, clip_high=2.5e-3),
  "gspo": TokenObjective(loss="grpo", importance_level="sequence", clip_low=0.02, clip_high=0.03),
  "asymmetric clip": TokenObjective(clip_low=0.1, clip_high=0.28),
  "delta": TokenObjective(clip_low=0.1, clip_high=0.1, delta=1.15),
  "cispo with a low cap": TokenObjective(loss="cispo", ratio_cap=1.05),
  **{f"{kl} with grpo": TokenObjective(loss="grpo", beta=0.1, kl=kl) for kl in ("k1", "k2", "k3", "exact")},
  **{f"plain {kl}": TokenObjective(beta=0.1, kl=kl, is_kl_weighted=False) for kl in ("k1", "k2", "k3")},
  "gspo with kl": TokenObjective(loss="grpo", importance_level="sequence", beta=0.1),
  "top entropy": TokenObjective(top_entropy=0.4, beta=0.1),
  "entropy bonus": TokenObjective(loss="dr_grpo", entropy_bonus=0.05),
  "vespo with its own k and lambda": TokenObjective(
    loss="vespo", k_positive=1.5, lambda_positive=2.5, k_negative=0.5, lambda_negative=0.25
  ),
  "sampling correction": TokenObjective(sampling_cap=1.1),
  "sampling floor": TokenObjective(sampling_floor=0.95, sampling_cap=1.1),
  "sampling mask": TokenObjective(sampling_floor=0.9, sampling_cap=1.1, sampling_correction="token_mask"),
  "sampling mask without a cap": TokenObjective(loss="sapo", sampling_floor=0.95, sampling_correction="token_mask"),
  "vespo with sampling correction": TokenObjective(loss="vespo", sampling_floor=0.95, sampling_cap=1.1),
  "vespo with a sampling mask": TokenObjective(loss="vespo", sampling_cap=1.3, sampling_correction="token_mask"),
  "off-policy mask": TokenObjective(off_policy_threshold=0.02),
  "masked truncation": TokenObjective(loss="grpo", truncation="mask"),
}


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def make_batch(seed=0):
  """Ragged captions with infinities in the padding."""
  random = np.random.default_rng(seed)
  shape = (PROMPTS, ROLLOUTS, TOKENS)
  lengths = random.integers(1, TOKENS + 1, size=shape[:2])
  mask = np.arange(TOKENS) < lengths[..., None]

  def log_probs(spread):
    values = base + spread * random.normal(size=shape)
    return np.where(mask, values, -np.inf)

  base = -random.uniform(0.1, 3, size=shape)
  return dict(
    log_probs=log_probs(0),
    old_log_probs=log_probs(0.2),
    advantages=random.normal(size=shape[:2]),
    mask=mask,
    reference_log_probs=log_probs(0.3),
    exact_kl=random.uniform(0, 1, size=shape),
    entropy=random.uniform(0, 2, size=shape),
    sampling_log_probs=log_probs(0.1),
    is_closed=lengths < TOKENS,
  )


def call(objective, batch, log_probs=None, **changes):
  arguments = {name: jnp.asarray(value) for name, value in batch.items()} | changes
  if log_probs is not None:
    arguments["log_probs"] = log_probs
  first = [arguments.pop(name) for name in ("log_probs", "old_log_probs", "advantages", "mask")]
  return token_objective(objective, *first, **arguments)


def rows(batch, start, stop):
  return {name: value[start:stop] for name, value in batch.items()}


def torch_loss(o, batch):
  """(loss, d loss / d log_probs), rollout by rollout and token by token."""
  log_probs = torch.tensor(batch["log_probs"], requires_grad=True)
  tensors = {name: torch.tensor(value) for name, value in batch.items()}
  entropies = tensors["entropy"][tensors["mask"]]
  threshold = torch.quantile(entropies, 1 - o.top_entropy)
  numerators, tokens = [], 0
  for i in range(PROMPTS):
    for j in range(ROLLOUTS):
      length = int(batch["mask"][i, j].sum())
      if o.truncation == "mask" and not batch["is_closed"][i, j]:
        length = 0
      tokens += length
      if not length:
        continue
      new, old = log_probs[i, j, :length], tensors["old_log_probs"][i, j, :length]
      advantage = tensors["advantages"][i, j]
      token_ratio = ratio = torch.exp(new - old)
      correction = torch.ones(length, dtype=torch.float64)
      if o.sampling_cap or o.sampling_floor:
        correction = torch.exp(old - tensors["sampling_log_probs"][i, j, :length])
        cap = o.sampling_cap or math.inf
        if o.sampling_correction == "token_mask":
          correction = torch.where((correction >= o.sampling_floor) & (correction <= cap), correction, 0)
        else:
          correction = correction.clamp(o.sampling_floor, cap)
      if o.importance_level == "sequence":
        ratio = torch.exp((new - old).mean()).repeat(length)
      if o.loss == "cispo":
        term = -ratio.detach().clamp(max=o.ratio_cap) * advantage * new
      elif o.loss == "sapo":
        tau = o.temperature_positive if advantage > 0 else o.temperature_negative
        term = -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * advantage
      elif o.loss == "vespo":
        k, rate = (o.k_positive, o.lambda_positive) if advantage > 0 else (o.k_negative, o.lambda_negative)
        log_w = (
          ((new - old).sum() + torch.log(correction).clamp(math.log(1e-8), 20).sum()).clamp(math.log(1e-8), 20).detach()
        )
        term = -torch.exp(rate + k * log_w - rate * torch.exp(log_w)) * advantage * new
      else:
        capped = ratio if o.delta is None else ratio.clamp(max=o.delta)
        term = -torch.min(capped * advantage, ratio.clamp(1 - o.clip_low, 1 + o.clip_high) * advantage)
      if o.loss != "vespo":
        term = term * correction
      if o.off_policy_threshold:
        drift = (tensors["sampling_log_probs"][i, j, :length] - new).mean().detach()
        term = term * bool(advantage >= 0 or drift <= o.off_policy_threshold)
      if o.top_entropy < 1:
        term = term * (tensors["entropy"][i, j, :length] >= threshold)
      if o.beta:
        d = tensors["reference_log_probs"][i, j, :length] - new
        divergence = {
          "k1": -d,
          "k2": d**2 / 2,
          "k3": torch.exp(d) - d - 1,
          "exact": tensors["exact_kl"][i, j, :length],
        }[o.kl]
        if o.is_kl_weighted and o.kl != "exact":
          divergence = divergence * (token_ratio.detach() if o.kl == "k2" else token_ratio)
        term = term + o.beta * divergence
      term = term - o.entropy_bonus * tensors["entropy"][i, j, :length]
      numerators.append(term.mean() if o.loss in ("grpo", "sapo") else term.sum())
  rollouts = PROMPTS * ROLLOUTS
  divisor = {"grpo": rollouts, "sapo": rollouts, "luspo": rollouts, "dr_grpo": rollouts * TOKENS}.get(o.loss, tokens)
  loss = sum(numerators) / divisor
  loss.backward()
  return loss.item(), log_probs.grad.numpy()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_value_and_gradient_equal_the_loops(name):
  objective, batch = CONFIGURATIONS[name], make_batch()
  expected, expected_gradient = torch_loss(objective, batch)

  def mean(log_probs):
    return call(objective, batch, log_probs)[0].mean

  value, gradient = jax.value_and_grad(mean)(jnp.asarray(batch["log_probs"]))
  assert float(value) == pytest.approx(expected, rel=1e-10)
  np.testing.assert_allclose(gradient, expected_gradient, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_micro_batches_add_to_the_batch(name):
  objective, batch = CONFIGURATIONS[name], make_batch()
  changes = {}
  if objective.top_entropy < 1:
    threshold = grpo.entropy_threshold(jnp.asarray(batch["entropy"]), jnp.asarray(batch["mask"]), objective.top_entropy)
    changes["entropy_threshold_value"] = threshold
  loss, metrics = call(objective, batch, **changes)
  microbatches = [call(objective, rows(batch, i, i + 1), **changes) for i in range(PROMPTS)]
  assert float(sum(microbatch.sum for microbatch, _ in microbatches)) == pytest.approx(float(loss.sum), rel=1e-10)
  # The denominator is known before the update, from the masks alone.
  masks = jnp.asarray(batch["mask"]), jnp.asarray(batch["is_closed"])
  assert (
    float(sum(microbatch.count for microbatch, _ in microbatches))
    == float(loss.count)
    == grpo.denominator(objective, *masks)
  )
  for metric, (total, count) in metrics.items():
    assert float(sum(m[metric][0] for _, m in microbatches)) == pytest.approx(float(total), rel=1e-10, abs=1e-12)
    assert float(sum(m[metric][1] for _, m in microbatches)) == float(count)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_before_the_first_update_the_ratio_is_one_and_the_kl_zero(name):
  objective, batch = CONFIGURATIONS[name], make_batch()
  batch["exact_kl"] = np.zeros_like(batch["exact_kl"])

  @jax.jit
  def metrics_of(log_probs, old):
    return call(objective, batch, log_probs, old_log_probs=old, reference_log_probs=old)[1]

  placed = jax.NamedSharding(sharding.make_mesh(data=4, fsdp=2), PartitionSpec("data"))
  log_probs = jnp.float32(batch["log_probs"])
  for values in (log_probs, jax.device_put(log_probs, placed)):
    metrics = metrics_of(values, values + 0)
    assert metrics["ratio_mean"][0] == metrics["ratio_mean"][1] > 0
    for metric in ("ratio_variance", "approximate_kl", "clip_fraction", "kl"):
      assert metrics.get(metric, (0, 0))[0] == 0


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_equal_rewards_give_no_policy_gradient(name):
  objective = dataclasses.replace(
    CONFIGURATIONS[name], beta=0.0, kl=TokenObjective().kl, is_kl_weighted=True, entropy_bonus=0.0
  )
  batch = make_batch()
  batch["advantages"] = group_advantages(jnp.full((PROMPTS, ROLLOUTS), 0.3), AdvantageOptions())
  gradient = jax.grad(lambda x: call(objective, batch, x)[0].sum)(jnp.asarray(batch["log_probs"]))
  np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_order_inside_a_group_does_not_matter(name):
  objective, batch = CONFIGURATIONS[name], make_batch()
  permuted = {name: value[:, [2, 0, 1]] for name, value in batch.items()}
  assert float(call(objective, permuted)[0].mean) == pytest.approx(float(call(objective, batch)[0].mean), rel=1e-12)


def test_sharded_loss_equals_the_single_device_loss():
  objective, batch = TokenObjective(beta=0.1, top_entropy=0.5), make_batch()
  mesh = sharding.make_mesh(data=4, fsdp=2)
  placed = {
    name: jax.device_put(jnp.asarray(value), jax.NamedSharding(mesh, PartitionSpec("data")))
    for name, value in batch.items()
  }
  loss = jax.jit(lambda batch: call(objective, batch)[0].mean)(placed)
  assert float(loss) == pytest.approx(float(call(objective, batch)[0].mean), rel=1e-12)


def test_clip_fractions_count_only_the_side_that_acts():
  ratios = np.log([[[1.5, 0.5]], [[1.5, 0.5]]])
  batch = dict(log_probs=ratios, old_log_probs=np.zeros_like(ratios), advantages=np.array([[1.0], [-1.0]]))
  _, metrics = call(TokenObjective(), batch | dict(mask=np.ones_like(ratios)))
  means = {name: float(total / count) for name, (total, count) in metrics.items()}
  assert means["clip_fraction_high"] == means["clip_fraction_low"] == 0.25 and means["clip_fraction"] == 0.5
  assert means["ratio_mean"] == 1.0 and means["ratio_variance"] == pytest.approx(0.25)
  assert means["approximate_kl"] == pytest.approx((math.log(1.5) ** 2 + math.log(2) ** 2) / 4)


def test_entropy_threshold_is_torchs_quantile():
  random = np.random.default_rng(3)
  entropy, mask = random.uniform(size=(3, 4, 5)), random.uniform(size=(3, 4, 5)) < 0.6
  for share in (0.1, 0.2, 0.5, 1.0):
    expected = torch.quantile(torch.tensor(entropy[mask]), 1 - share).item()
    actual = grpo.entropy_threshold(jnp.asarray(entropy), jnp.asarray(mask), share)
    assert float(actual) == pytest.approx(expected, rel=1e-12)


def test_the_off_policy_mask_drops_some_rollouts_and_not_all():
  """Otherwise the comparison with PyTorch would also pass without the mask."""
  batch = make_batch()
  gradients = [
    jax.grad(lambda x, o=o: call(o, batch, x)[0].sum)(jnp.asarray(batch["log_probs"]))
    for o in (TokenObjective(), TokenObjective(off_policy_threshold=0.02))
  ]
  is_kept = [np.any(np.asarray(gradient) != 0, axis=-1) for gradient in gradients]
  assert 0 < is_kept[1].sum() < is_kept[0].sum()
  assert np.array_equal(is_kept[1][batch["advantages"] > 0], is_kept[0][batch["advantages"] > 0])


def test_entropy_bonus_and_exact_kl_follow_the_logits():
  """Differentiates log-probability, entropy and KL of the same logits, as in the captioner."""
  random = np.random.default_rng(7)
  batch = make_batch()
  logits, other = random.normal(size=(2, *batch["mask"].shape, 5))
  chosen = random.integers(0, 5, size=batch["mask"].shape)
  objective = TokenObjective(loss="grpo", entropy_bonus=0.05, beta=0.1, kl="exact")

  def loss(logits):
    log_p = jax.nn.log_softmax(logits)
    log_probs = jnp.take_along_axis(log_p, jnp.asarray(chosen)[..., None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
    changes = dict(entropy=entropy, exact_kl=kl.exact(logits, jnp.asarray(other)))
    return call(objective, batch, log_probs, **changes)[0].mean

  scores = torch.tensor(logits, requires_grad=True)
  log_p = torch.log_softmax(scores, -1)
  new = torch.gather(log_p, -1, torch.tensor(chosen)[..., None])[..., 0]
  mask, advantages = torch.tensor(batch["mask"]), torch.tensor(batch["advantages"])[..., None]
  ratio = torch.where(mask, torch.exp(new - torch.where(mask, torch.tensor(batch["old_log_probs"]), 0)), 1)
  divergence = (log_p.exp() * (log_p - torch.log_softmax(torch.tensor(other), -1))).sum(-1)
  entropy = -(log_p.exp() * log_p).sum(-1)
  terms = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) + 0.1 * divergence - 0.05 * entropy
  expected = ((terms * mask).sum(-1) / mask.sum(-1)).mean()
  expected.backward()
  value, gradient = jax.value_and_grad(loss)(jnp.asarray(logits))
  assert float(value) == pytest.approx(expected.item(), rel=1e-10)
  np.testing.assert_allclose(gradient, scores.grad.numpy(), atol=1e-12)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_default_kl_term_has_the_gradient_of_the_kl_to_the_reference(level):
  """Exact expectation over all captions of two tokens out of three, on policy."""
  objective = TokenObjective(loss="dr_grpo", importance_level=level, beta=1.0)
  random = np.random.default_rng(5)
  logits, reference = random.normal(size=(2, 2, 3))
  chosen = np.asarray([(a, b) for a in range(3) for b in range(3)])
  places = np.arange(2)
  log_reference = np.asarray(jax.nn.log_softmax(jnp.asarray(reference)))[places, chosen]

  def expected_loss(logits):
    log_probs = jax.nn.log_softmax(logits)[places, chosen][:, None]
    arguments = (log_probs, jax.lax.stop_gradient(log_probs), jnp.zeros((9, 1)), jnp.ones((9, 1, 2)))
    sums = jax.vmap(
      lambda *rows: token_objective(objective, *(x[None] for x in rows[:-1]), reference_log_probs=rows[-1][None])[0].sum
    )(*arguments, jnp.asarray(log_reference)[:, None])
    return jnp.sum(jax.lax.stop_gradient(jnp.exp(log_probs.sum(axis=(1, 2)))) * sums)

  scores = torch.tensor(logits, requires_grad=True)
  log_p, log_q = torch.log_softmax(scores, -1), torch.log_softmax(torch.tensor(reference), -1)
  (log_p.exp() * (log_p - log_q)).sum().backward()
  np.testing.assert_allclose(jax.grad(expected_loss)(jnp.asarray(logits)), scores.grad.numpy(), atol=1e-12)


@pytest.mark.parametrize(
  "options",
  [
    dict(loss="vespo", importance_level="sequence"),
    dict(loss="dapo", k_positive=1.0),
    dict(loss="grpo", lambda_negative=1.0),
    dict(loss="cispo", clip_low=0.1),
    dict(loss="sapo", clip_high=0.1),
    dict(is_kl_weighted=False),
    dict(beta=0.1, kl="exact", is_kl_weighted=False),
    dict(sampling_correction="token_mask"),
  ],
)
def test_options_that_do_nothing_are_refused(options):
  with pytest.raises(ValueError, match="does nothing with"):
    TokenObjective(**options)


@pytest.mark.parametrize(
  "call_",
  [
    lambda: TokenObjective(loss="ppo"),
    lambda: TokenObjective(loss="luspo"),
    lambda: TokenObjective(delta=1.1),
    lambda: TokenObjective(clip_low=0.0),
    lambda: TokenObjective(entropy_bonus=-0.1),
    lambda: TokenObjective(loss="vespo", lambda_positive=0.0),
    lambda: TokenObjective(sampling_cap=0.5),
    lambda: TokenObjective(sampling_floor=1.5),
    lambda: TokenObjective(sampling_cap=1.0, sampling_floor=1.0),
    lambda: call(TokenObjective(sampling_floor=0.5), {k: v for k, v in make_batch().items() if "sampling" not in k}),
    lambda: TokenObjective(top_entropy=0.0),
    lambda: TokenObjective(kl="k4"),
    lambda: call(TokenObjective(beta=0.1), {k: v for k, v in make_batch().items() if k != "reference_log_probs"}),
    lambda: call(TokenObjective(truncation="mask"), {k: v for k, v in make_batch().items() if k != "is_closed"}),
  ],
)
def test_wrong_options_are_refused(call_):
  with pytest.raises(ValueError, match="expected|needs"):
    call_()
