"""The one entry to attention, and attention over a prefix that a group of rollouts shares."""

import jax
import jax.numpy as jnp


def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array | None = None, is_causal: bool = False
) -> jax.Array:
  """softmax(q k^T / sqrt(H)) v, softmax in float32.

  Args:
    q: float[B, T, N, H].
    k: float[B, S, K, H] with K dividing N (grouped queries).
    v: float[B, S, K, H].
    mask: bool, broadcastable to [B, N, T, S]; True where a query may look.
    is_causal: query t sees keys up to t (T = S).

  Returns:
    float[B, T, N, H] in the dtype of q.
  """
  return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=is_causal, implementation="xla")


def attend_shared_prefix(
  q: jax.Array,
  prefix_k: jax.Array,
  prefix_v: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  prefix_mask: jax.Array,
  mask: jax.Array,
) -> jax.Array:
  """Attention of R rollouts a prompt over one shared prefix and each rollout's own suffix; the prefix is never
  repeated.

  One softmax over the logits of both parts, so the result is that of attention over the concatenation.

  Args:
    q: float[B, R, T, N, H].
    prefix_k: float[B, P, K, H].
    prefix_v: float[B, P, K, H].
    k: float[B, R, S, K, H].
    v: float[B, R, S, K, H].
    prefix_mask: bool[B, P]; False at padding.
    mask: bool, broadcastable to [B, R, T, S].

  Returns:
    float[B, R, T, N, H].
  """
  b, r, t, n, h = q.shape
  num_kv = k.shape[-2]
  q = q.reshape(b, r, t, num_kv, n // num_kv, h)
  prefix_logits = jnp.einsum("BRTKGH,BPKH->BRKGTP", q, prefix_k, preferred_element_type=jnp.float32)
  suffix_logits = jnp.einsum("BRTKGH,BRSKH->BRKGTS", q, k, preferred_element_type=jnp.float32)
  lowest = jnp.finfo(jnp.float32).min
  prefix_logits = jnp.where(prefix_mask[:, None, None, None, None, :], prefix_logits * h**-0.5, lowest)
  suffix_logits = jnp.where(mask[:, :, None, None], suffix_logits * h**-0.5, lowest)
  weights = jax.nn.softmax(jnp.concatenate([prefix_logits, suffix_logits], axis=-1), axis=-1).astype(q.dtype)
  prefix_weights, suffix_weights = jnp.split(weights, [prefix_k.shape[1]], axis=-1)
  out = jnp.einsum("BRKGTP,BPKH->BRTKGH", prefix_weights, prefix_v)
  out = out + jnp.einsum("BRKGTS,BRSKH->BRTKGH", suffix_weights, v)
  return out.reshape(b, r, t, n, h)
