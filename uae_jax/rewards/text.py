"""Rewards from the tokens of a caption alone, computed on the device. Used for shaping only: they do not see the image.

    length       -clip((|o| - free) / (budget - free), 0, 1)   0 up to `free` tokens, -1 at the end of the budget
    repetition   -(n-grams that an earlier one of the caption equals) / (n-grams)
    format       1 if the caption is closed, not empty and free of control tokens, else 0
    truncation   -1 if the caption ran out of budget, else 0

|o| counts the tokens before the closing one. Sources: "length" is DAPO's soft overlong punishment (arXiv 2503.14476
equation 13, with L_cache = budget - free), "truncation" its hard form; "repetition" is arXiv 2502.03373 section 4.2 as
in Open-R1.
"""

import jax
import jax.numpy as jnp

from uae_jax.options import TEXT_REWARDS, TextRewardOptions


def text_reward(
  name: str, options: TextRewardOptions, tokens: jax.Array, mask: jax.Array, is_closed: jax.Array
) -> jax.Array:
  """Computes one of `TEXT_REWARDS`.

  Args:
    name: name of the reward.
    options: free length, n-gram size and forbidden tokens.
    tokens: int32[..., L]; L is the budget, including the closing token.
    mask: bool[..., L], True up to and including the closing token.
    is_closed: bool[...], False where the caption reached L tokens without a closing one.

  Returns:
    float32[...].

  Raises:
    ValueError: the name is unknown, or `length_free_tokens` is not less than the budget.
  """
  content = _content(mask, is_closed)
  if name == "length":
    return _length(options.length_free_tokens, content)
  if name == "repetition":
    return _repetition(options.repetition_ngram, tokens, content)
  if name == "format":
    is_forbidden = jnp.isin(tokens, jnp.asarray(options.forbidden_tokens, tokens.dtype)) & content
    return (is_closed & jnp.any(content, axis=-1) & ~jnp.any(is_forbidden, axis=-1)).astype(jnp.float32)
  if name == "truncation":
    return is_closed.astype(jnp.float32) - 1.0
  raise ValueError(f"text reward {name!r}: expected one of {', '.join(TEXT_REWARDS)}")


def _content(mask: jax.Array, is_closed: jax.Array) -> jax.Array:
  """Masks the tokens before the closing one: bool[..., L]."""
  length = jnp.sum(mask, axis=-1, keepdims=True) - is_closed[..., None]
  return jnp.arange(mask.shape[-1]) < length


def _length(free: int, content: jax.Array) -> jax.Array:
  budget = content.shape[-1]
  if free >= budget:
    raise ValueError(f"length_free_tokens = {free} leaves nothing of a budget of {budget} tokens")
  length = jnp.sum(content, axis=-1).astype(jnp.float32)
  return -jnp.clip((length - free) / (budget - free), 0.0, 1.0)


def _repetition(ngram: int, tokens: jax.Array, content: jax.Array) -> jax.Array:
  places = tokens.shape[-1] - ngram + 1
  if places < 1:
    return jnp.zeros(tokens.shape[:-1], jnp.float32)
  # Position i starts an n-gram if the caption contains all n tokens from there on.
  is_ngram = content[..., ngram - 1 :]
  is_equal: jax.Array | bool = True
  for k in range(ngram):
    part = tokens[..., k : k + places]
    is_equal &= part[..., :, None] == part[..., None, :]
  is_earlier = jnp.arange(places)[:, None] > jnp.arange(places)[None, :]
  is_repeated = jnp.any(is_equal & is_earlier & is_ngram[..., None, :], axis=-1) & is_ngram
  return -jnp.sum(is_repeated, axis=-1) / jnp.maximum(jnp.sum(is_ngram, axis=-1), 1).astype(jnp.float32)
