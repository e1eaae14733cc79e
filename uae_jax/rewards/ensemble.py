"""The weighted ensemble of rewards of a stage: embedders, text rewards, an external reward, and a held-out embedder."""

from collections.abc import Callable, Collection, Mapping
import dataclasses

import jax
import jax.numpy as jnp

from uae_jax.algorithms.advantages import multi_reward_advantages, zero_std_fraction
from uae_jax.options import (
  EXTERNAL,
  TEXT_REWARDS,
  AdvantageOptions,
  RewardOptions,
  TextRewardOptions,
  embedder_of,
  is_similarity,
)
from uae_jax.rewards.cosine import cosine_rewards, weighted_sum
from uae_jax.rewards.text import text_reward


@dataclasses.dataclass(frozen=True)
class Ensemble:
  """Rewards of a stage with their weights, and the held-out embedder.

  The name of a reward is that of an embedder, that of a text reward, or one of those whose values are added between the
  reward and the advantage phase: "http" for the external reward, and the matches of image and text. A reward of weight
  0 is logged but not optimized.

  Attributes:
    weights: (name, weight) pairs.
    held_out: embedder that is measured and never rewarded, to detect reward hacking; "" for none.
    text: options of the text rewards.
  """

  weights: tuple[tuple[str, float], ...]
  held_out: str = ""
  text: TextRewardOptions = TextRewardOptions()

  def __post_init__(self):
    names = [name for name, _ in self.weights]
    if len(set(names)) < len(names):
      raise ValueError(f"reward_weights = {self.weights}: a reward is named twice")
    if embedder_of(self.held_out) in map(embedder_of, names):
      raise ValueError(
        f"held_out_embedder = {self.held_out!r} is also in reward_weights: what is rewarded cannot tell reward hacking"
      )
    if not any(weight for _, weight in self.weights):
      raise ValueError(f"reward_weights = {self.weights}: nothing has a weight, so there is nothing to learn")

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(name for name, _ in self.weights)

  @property
  def embedders(self) -> tuple[str, ...]:
    """Names of the rewarded embedders."""
    return tuple(name for name in self.names if is_similarity(name))

  @property
  def texts(self) -> tuple[str, ...]:
    return tuple(name for name in self.names if name in TEXT_REWARDS)

  @property
  def has_external(self) -> bool:
    return EXTERNAL in self.names

  def check(self, known_encoders: Collection[str]) -> None:
    """Checks that the run has every embedder of the ensemble.

    Raises:
      ValueError: an embedder is missing; the message names it.
    """
    unknown = {name for name in self.embedders if embedder_of(name) not in known_encoders}
    if unknown:
      raise ValueError(
        f"reward_weights names {sorted(unknown)}: expected embedders of the run ({', '.join(sorted(known_encoders))}), "
        f"KIND_patches for their patches, text rewards ({', '.join(TEXT_REWARDS)}), KIND_text for the match of image "
        f"and text, or {EXTERNAL!r}"
      )
    if self.held_out and embedder_of(self.held_out) not in known_encoders:
      raise ValueError(f"held_out_embedder = {self.held_out!r}: expected one of {', '.join(sorted(known_encoders))}")

  def measure(
    self,
    embed: Callable[[str, jax.Array], jax.Array],
    images: jax.Array,
    reconstructions: jax.Array,
    captions: tuple[jax.Array, jax.Array, jax.Array] | None = None,
  ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Computes all rewards except those that are added later: (rewards name -> float32[prompts, rollouts], metrics).

    Args:
      embed: (name of the embedder, float[B, H, W, 3] in [-1, 1]) -> unit-norm float32[B, E].
      images: float[prompts, H, W, 3] in [-1, 1], originals.
      reconstructions: float[prompts * rollouts, H, W, 3] in [-1, 1], the rollouts of a prompt in consecutive rows.
      captions: (tokens int32[prompts, rollouts, L], mask, is_closed), see `text_reward`; required by text rewards.

    Raises:
      ValueError: a text reward has no captions.
    """
    held_out = (self.held_out,) if self.held_out else ()
    similarities = cosine_rewards(embed, self.embedders + held_out, images, reconstructions)
    rewards = {name: similarities[name] for name in self.embedders}
    if self.texts:
      if captions is None:
        raise ValueError(f"reward_weights names {', '.join(self.texts)}: text rewards need captions")
      rewards |= {name: text_reward(name, self.text, *captions) for name in self.texts}
    metrics = {"held_out_reward": jnp.mean(similarities[self.held_out])} if self.held_out else {}
    return rewards, metrics

  def advantages(self, rewards: Mapping[str, jax.Array], options: AdvantageOptions) -> tuple[jax.Array, dict]:
    """Computes (advantages float32[prompts, rollouts], metrics) of all rewards, including the external one."""
    weights = {name: weight for name, weight in self.weights if weight}
    values = multi_reward_advantages(rewards, weights, options)
    total = weighted_sum(rewards, weights)
    metrics = reward_statistics("reward", total)
    metrics |= {
      "reward_min": jnp.min(jnp.where(jnp.isfinite(total), total, jnp.inf)),
      "reward_max": jnp.max(jnp.where(jnp.isfinite(total), total, -jnp.inf)),
      "zero_std_fraction": zero_std_fraction(total),
      "advantage_abs_mean": jnp.mean(jnp.abs(values)),
      "advantage_abs_max": jnp.max(jnp.abs(values)),
    }
    for name in self.names:
      metrics |= reward_statistics(f"reward_{name}", rewards[name])
    if self.has_external:
      metrics["external_failures"] = 1.0 - jnp.mean(jnp.isfinite(rewards[EXTERNAL]))
    return values, metrics


def reward_statistics(name: str, rewards: jax.Array) -> dict[str, jax.Array]:
  """Computes the mean of rewards float32[prompts, rollouts] and the mean in-group std, over the finite values."""
  valid = jnp.isfinite(rewards)
  count = jnp.sum(valid, axis=1, keepdims=True)
  finite = jnp.where(valid, rewards, 0)
  means = jnp.sum(finite, axis=1, keepdims=True) / jnp.maximum(count, 1)
  squares = jnp.sum(jnp.where(valid, jnp.square(rewards - means), 0), axis=1) / jnp.maximum(count[:, 0], 1)
  return {
    name: jnp.sum(finite) / jnp.maximum(jnp.sum(valid), 1),
    f"{name}_std_in_group": jnp.sum(jnp.sqrt(squares)) / jnp.maximum(jnp.sum(count > 0), 1),
  }


def rewarded_embedders(options: RewardOptions) -> dict[str, str]:
  """Returns {field of the options: embedder named there} for every embedder that is rewarded or held out."""
  names = [name for name in options.reward_names if is_similarity(name)]
  found = {f"reward_weights {name!r}": embedder_of(name) for name in names}
  held_out = embedder_of(options.held_out_embedder)
  return found | ({"held_out_embedder": held_out} if held_out else {})
