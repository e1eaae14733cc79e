"""Advantages equal formulas in numpy; failed rewards and constant groups contribute exactly zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax.algorithms.advantages import group_advantages, multi_reward_advantages, zero_std_fraction
from uae_jax.options import AdvantageOptions
from uae_jax.options.optimization import ADVANTAGE_SCALES as SCALES

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("is_unbiased", [True, False])
def test_formula(scale, is_unbiased):
  rewards = draw(4, 6)
  stds = rewards.std(axis=1, ddof=int(is_unbiased), keepdims=True)
  divisor = {"group": stds, "batch": rewards.std(ddof=int(is_unbiased)), "mean_group": stds.mean(), "none": 1 - 1e-4}[
    scale
  ]
  expected = (rewards - rewards.mean(axis=1, keepdims=True)) / (divisor + 1e-4)
  options = AdvantageOptions(scale=scale, is_unbiased=is_unbiased)
  np.testing.assert_allclose(group_advantages(rewards, options), expected, rtol=1e-10)
  clipped = group_advantages(rewards, AdvantageOptions(scale=scale, is_unbiased=is_unbiased, clip=0.5))
  np.testing.assert_allclose(clipped, expected.clip(-0.5, 0.5), rtol=1e-10)


@pytest.mark.parametrize("scale", SCALES)
def test_constant_groups_are_exactly_zero(scale):
  rewards = np.float32([[0.1, 0.1, 0.1], [0.2, 0.7, 0.3]])
  advantages = group_advantages(rewards, AdvantageOptions(scale=scale, eps=1e-8))
  assert not advantages[0].any() and advantages[1].all()
  assert float(zero_std_fraction(jnp.asarray(rewards))) == 0.5


@pytest.mark.parametrize("scale", SCALES)
def test_a_failed_reward_has_no_advantage_and_enters_no_statistic(scale):
  rewards = draw(3, 5)
  with_failures = rewards.copy()
  with_failures[0, 2], with_failures[1] = np.nan, np.nan
  advantages = group_advantages(with_failures, AdvantageOptions(scale=scale))
  kept = [0, 1, 3, 4]
  assert advantages[0, 2] == 0 and not advantages[1].any() and np.isfinite(advantages).all()
  stds = [rewards[0, kept].std(ddof=1), rewards[2].std(ddof=1)]
  divisor = {
    "group": stds[0],
    "batch": np.concatenate([rewards[0, kept], rewards[2]]).std(ddof=1),
    "mean_group": np.mean(stds),
    "none": 1 - 1e-4,
  }[scale]
  expected = (rewards[0, kept] - rewards[0, kept].mean()) / (divisor + 1e-4)
  np.testing.assert_allclose(advantages[0][jnp.array(kept)], expected, rtol=1e-10)
  assert float(zero_std_fraction(jnp.asarray(with_failures))) == pytest.approx(1 / 3)


@pytest.mark.parametrize("scale", SCALES)
def test_permuting_a_group_permutes_its_advantages(scale):
  rewards, order = draw(3, 5), np.array([4, 2, 0, 1, 3])
  options = AdvantageOptions(scale=scale)
  advantages = group_advantages(rewards, options)
  np.testing.assert_allclose(group_advantages(rewards[:, order], options), advantages[:, order], atol=1e-12)
  np.testing.assert_allclose(np.sum(advantages, axis=1), 0, atol=1e-12)


def test_one_rollout_has_no_advantage():
  assert not group_advantages(draw(4, 1), AdvantageOptions()).any()


def test_several_rewards_summed_then_normalised():
  first, second = draw(3, 4), draw(3, 4, seed=1)
  options = AdvantageOptions(scale="batch")
  actual = multi_reward_advantages({"a": first, "b": second, "measured": first}, {"a": 1.0, "b": 0.5}, options)
  np.testing.assert_allclose(actual, group_advantages(first + 0.5 * second, options), atol=1e-12)


def test_several_rewards_normalised_then_summed():
  first, second = draw(3, 4), 1e-3 * draw(3, 4, seed=1)
  options = AdvantageOptions(aggregation="normalize_then_sum")

  def z(x):
    return (x - x.mean(axis=1, keepdims=True)) / (x.std(axis=1, ddof=1, keepdims=True) + 1e-4)

  total = z(first) + 0.5 * z(second)
  expected = (total - total.mean()) / (total.std(ddof=1) + 1e-4)
  actual = multi_reward_advantages({"a": first, "b": second}, {"a": 1.0, "b": 0.5}, options)
  np.testing.assert_allclose(actual, expected, atol=1e-10)
  # A small reward keeps its weight: the scale of a reward has no effect.
  larger = multi_reward_advantages({"a": first, "b": 100 * second}, {"a": 1.0, "b": 0.5}, options)
  np.testing.assert_allclose(actual, larger, atol=0.2)


def test_a_rollout_that_lacks_a_reward_of_a_sum_has_no_advantage():
  """Unlike in TRL, which sums the others: a sum of fewer rewards is no smaller reward."""
  first, second = draw(3, 4), draw(3, 4, seed=1)
  second[1, 2] = np.nan
  actual = multi_reward_advantages({"a": first, "b": second}, {"a": 1.0, "b": 0.5}, AdvantageOptions())
  total = first + 0.5 * second
  std = np.nanstd(total, axis=1, ddof=1, keepdims=True)
  expected = (total - np.nanmean(total, axis=1, keepdims=True)) / (std + 1e-4)
  np.testing.assert_allclose(actual, np.nan_to_num(expected), atol=1e-10)
  assert actual[1, 2] == 0


def test_a_rollout_without_any_reward_enters_no_statistic():
  """One that lacks only one of two rewards has the other."""
  first, second = draw(3, 4), draw(3, 4, seed=1)
  first[0, 1] = second[0, 1] = second[2, 3] = np.nan
  options = AdvantageOptions(aggregation="normalize_then_sum")

  def z(x):
    return (x - np.nanmean(x, axis=1, keepdims=True)) / (np.nanstd(x, axis=1, ddof=1, keepdims=True) + 1e-4)

  total = z(first) + 0.5 * np.nan_to_num(z(second))
  assert np.isnan(total).sum() == 1
  expected = total / (np.nanstd(total, ddof=1) + 1e-4)
  actual = multi_reward_advantages({"a": first, "b": second}, {"a": 1.0, "b": 0.5}, options)
  np.testing.assert_allclose(actual, np.nan_to_num(expected), atol=1e-10)
  nothing = multi_reward_advantages({"a": np.full((2, 3), np.nan)}, {"a": 1.0}, options)
  np.testing.assert_array_equal(nothing, 0)


def test_unknown_names_are_refused():
  with pytest.raises(ValueError, match="scale"):
    AdvantageOptions(scale="prompt")
  with pytest.raises(ValueError, match="name"):
    multi_reward_advantages({"a": draw(2, 2)}, {"b": 1.0}, AdvantageOptions())
