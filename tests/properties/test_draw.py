"""Tokens are drawn with the frequency of their probability, and never if it is zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax.rollouts.captions import pick, uniform_pair


@pytest.mark.parametrize("vocabulary", [7, 256])  # one group; 128 groups of two
def test_frequencies_are_the_probabilities(vocabulary):
  count = 20_000
  weights = jax.random.uniform(jax.random.key(0), (vocabulary,)).at[jnp.array([0, 3, vocabulary - 1])].set(0.0)
  drawn = np.asarray(pick(jnp.broadcast_to(weights, (count, vocabulary)), *uniform_pair(jax.random.key(1), (count,))))
  expected = np.asarray(weights / weights.sum())
  found = np.bincount(drawn, minlength=vocabulary) / count
  assert np.all(found[expected == 0] == 0)
  # Five standard deviations of an empirical frequency.
  assert np.all(np.abs(found - expected) <= 5 * np.sqrt(expected / count))


def test_rows_and_keys_are_drawn_apart():
  weights = jnp.ones((4, 256))
  one, other = (pick(weights, *uniform_pair(jax.random.key(i), (4,))) for i in range(2))
  assert len(set(one.tolist())) > 1 and one.tolist() != other.tolist()


@pytest.mark.parametrize("vocabulary", [7, 256])
def test_a_uniform_number_of_one_is_the_last_entry(vocabulary):
  ones = jnp.ones((3,))
  drawn = pick(jnp.ones((3, vocabulary)), ones, ones)
  assert drawn.tolist() == [vocabulary - 1] * 3
  assert pick(jnp.ones((3, vocabulary)), 0 * ones, 0 * ones).tolist() == [0] * 3
