"""Truncation keeps the tokens that transformers and a loop over the sorted vocabulary keep, and no others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from uae_jax.rollouts.token_distribution import REMOVED, kept_tokens, pack, remove, unpack

pytestmark = pytest.mark.fast

TRUNCATIONS = [
  dict(),
  dict(top_k=3),
  dict(top_k=1000),
  dict(top_p=0.8),
  dict(top_p=1e-6),
  dict(min_p=0.2),
  dict(min_p=1.0),
  dict(top_k=7, top_p=0.6),
  dict(top_k=9, top_p=0.95, min_p=0.3),
]
IDS = [",".join(f"{name}={value}" for name, value in options.items()) or "off" for options in TRUNCATIONS]


def scores_of(rows=6, vocabulary=19):
  return 2 * np.random.default_rng(0).normal(size=(rows, vocabulary))


def by_hand(scores, top_k=0, top_p=1.0, min_p=0.0):
  """The kept tokens of one row, taken one after the other from the most likely one."""
  order = [int(i) for i in np.argsort(-scores)]
  if top_k:
    order = order[:top_k]
  probabilities = {i: np.exp(scores[i]) / sum(np.exp(scores[j]) for j in order) for i in order}
  kept, total = [], 0.0
  for i in order:
    if total >= top_p:
      break
    kept.append(i)
    total += probabilities[i]
  best = probabilities[order[0]]
  return {i for i in kept if probabilities[i] >= min_p * best}


@pytest.mark.parametrize("options", TRUNCATIONS, ids=IDS)
def test_kept_tokens_equal_the_loop_and_transformers(options):
  from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

  scores = scores_of()
  with jax.enable_x64(True):
    is_kept = np.asarray(kept_tokens(jnp.asarray(scores), **options))
  assert [set(np.flatnonzero(row)) for row in is_kept] == [by_hand(row, **options) for row in scores]
  theirs = torch.tensor(scores)
  for name, warper in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
    if name in options:
      theirs = warper(options[name])(None, theirs)
  np.testing.assert_array_equal(is_kept, torch.isfinite(theirs).numpy())
  ours = np.where(is_kept, scores, -np.inf)
  ours = np.exp(ours) / np.exp(ours).sum(axis=-1, keepdims=True)
  np.testing.assert_allclose(jax.nn.softmax(remove(jnp.float32(scores), is_kept)), ours, atol=1e-6)
  np.testing.assert_allclose(torch.softmax(theirs, -1).numpy(), ours, atol=1e-12)


def test_equally_likely_tokens_are_kept_together():
  scores = jnp.asarray([[1.0, 1.0, 1.0, 0.0]])
  for options in (dict(top_k=1), dict(top_p=0.1), dict(min_p=1.0)):
    assert kept_tokens(scores, **options).tolist() == [[True, True, True, False]]


def test_removed_tokens_stay_removed_and_have_no_gradient():
  """They must not come back through a later truncation, nor make an entropy or its gradient NaN."""
  scores = remove(jnp.asarray(scores_of(2), jnp.float32), jnp.arange(19) >= 2)
  assert not kept_tokens(scores, top_k=18, top_p=0.99999)[:, :2].any()

  def entropy(x):
    log_p = jax.nn.log_softmax(remove(x, scores > REMOVED / 2))
    return -jnp.sum(jnp.exp(log_p) * log_p)

  value, gradient = jax.value_and_grad(entropy)(scores)
  assert np.isfinite(value) and np.all(np.asarray(gradient)[:, :2] == 0) and np.any(gradient != 0)


@pytest.mark.parametrize("vocabulary", [16, 19])
def test_sets_survive_packing(vocabulary):
  is_kept = np.random.default_rng(1).uniform(size=(2, 3, vocabulary)) < 0.5
  packed = pack(jnp.asarray(is_kept))
  assert packed.shape == (2, 3, -(-vocabulary // 8)) and packed.dtype == jnp.uint8
  np.testing.assert_array_equal(unpack(packed, vocabulary), is_kept)
