"""The reward of UAE: how close the reconstruction is to the original in embedding spaces.

Source: arXiv 2509.09666 equation 1, r = sum_k w_k cos(f_k(x), f_k(x_hat)).
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp


def cosine_rewards(
  embed: Callable[[str, jax.Array], jax.Array], names: tuple[str, ...], images: jax.Array, reconstructions: jax.Array
) -> dict[str, jax.Array]:
  """Computes cos(f_k(x), f_k(x_hat)) for every embedder; each original is embedded once per group.

  Args:
    embed: (name of the embedder, float[B, H, W, 3] in [-1, 1]) -> unit-norm float32[B, E].
    names: names of the embedders.
    images: float[prompts, H, W, 3] in [-1, 1], originals.
    reconstructions: float[prompts * rollouts, H, W, 3] in [-1, 1], the rollouts of a prompt in consecutive rows.

  Returns:
    name -> float32[prompts, rollouts].
  """
  num_prompts = images.shape[0]

  def similarity(name):
    original = embed(name, images)
    generated = embed(name, reconstructions).reshape(num_prompts, -1, original.shape[-1])
    return jnp.einsum("PE,PRE->PR", original, generated)

  return {name: similarity(name) for name in names}


def weighted_sum(rewards: Mapping[str, jax.Array], weights: Mapping[str, float]) -> jax.Array:
  """Computes sum_k w_k r_k, float32[prompts, rollouts].

  Raises:
    ValueError: a weight has a name that is not among the rewards.
  """
  unknown = set(weights) - set(rewards)
  if unknown:
    raise ValueError(f"reward weights name {sorted(unknown)}, rewards are {sorted(rewards)}")
  return jnp.asarray(sum(weight * rewards[name] for name, weight in weights.items()))
