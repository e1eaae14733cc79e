"""The distribution that caption tokens are drawn from, the same in rollout and replay.

    logits -> without tokens that are not text -> / temperature -> top_k -> top_p -> min_p -> softmax

Each truncation acts on the distribution that the one before it left, in the order of transformers and TRL. Removed
tokens have probability 0, the others are renormalized. The set of kept tokens depends on the policy that sampled:
replay takes the recorded set instead of computing its own, so the ratio is exactly 1 before the first update, and a
sampled token never drops out of the set (DeepSeek-V3.2, section 3.1, "Keep Sampling Mask").
"""

import jax
import jax.numpy as jnp

# A removed logit. It is finite, so that p log p of a removed token is 0 and not NaN, and so is its gradient.
REMOVED = -1e30


def truncates(top_k: int, top_p: float, min_p: float) -> bool:
  """Whether these values remove any tokens."""
  return top_k > 0 or top_p < 1.0 or min_p > 0.0


def remove(logits: jax.Array, is_kept: jax.Array) -> jax.Array:
  """Removes tokens from a distribution: logits float32[..., V], is_kept bool[..., V] -> float32[..., V]."""
  return jnp.where(is_kept, logits, REMOVED)


def kept_tokens(scores: jax.Array, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> jax.Array:
  """Finds the tokens that truncation keeps; at least the most likely one.

  Tokens that are exactly as likely as the last one kept are kept too.

  Args:
    scores: float32[..., V], logits divided by the temperature.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the most likely tokens up to the one at which their probabilities sum to at least p; 1 keeps all.
    min_p: keep tokens with at least min_p times the probability of the most likely one; 0 keeps all.

  Returns:
    bool[..., V].
  """
  is_kept = scores > REMOVED / 2
  if top_k:
    lowest = jax.lax.top_k(scores, min(top_k, scores.shape[-1]))[0][..., -1:]
    is_kept &= scores >= lowest
  if top_p < 1.0:
    ordered = jnp.sort(remove(scores, is_kept), axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    count = jnp.maximum(jnp.sum(before < top_p, axis=-1, keepdims=True), 1)
    is_kept &= scores >= jnp.take_along_axis(ordered, count - 1, axis=-1)
  if min_p > 0.0:
    is_kept &= scores >= jnp.max(scores, axis=-1, keepdims=True) + jnp.log(min_p)
  return is_kept


def pack(is_kept: jax.Array) -> jax.Array:
  """Packs sets of tokens to bits: bool[..., V] -> uint8[..., ceil(V / 8)]."""
  return jnp.packbits(is_kept, axis=-1)


def unpack(packed: jax.Array, vocab_size: int) -> jax.Array:
  """The inverse of `pack`: uint8[..., ceil(V / 8)] -> bool[..., V]."""
  return jnp.unpackbits(packed, axis=-1, count=vocab_size).astype(bool)
