"""The weighted ensemble of a stage: embedders and text rewards on the device, a judge outside, and one encoder that is
only measured.
"""

from collections.abc import Callable, Collection, Mapping
import dataclasses

import jax
import jax.numpy as jnp

from uae_jax.algorithms.advantages import multi_reward_advantages, zero_std_fraction
from uae_jax.options import EXTERNAL, TEXT_REWARDS, AdvantageOptions, RewardOptions, TextRewardOptions
from uae_jax.rewards.cosine import cosine_rewards, weighted_sum
from uae_jax.rewards.text import text_reward


@dataclasses.dataclass(frozen=True)
class Ensemble:
  """What a rollout is worth, and what is measured beside it.

  A reward is named by its encoder, by a text reward, or "http" for the judge outside, whose values join the others
  between the phases. A weight of 0 measures a reward without paying for it.

  Attributes:
    weights: (name, weight) pairs.
    held_out: encoder that is measured and never rewarded, to see reward hacking; "" for none.
    text: options of the text rewards.
  """

  weights: tuple[tuple[str, float], ...]
  held_out: str = ""
  text: TextRewardOptions = TextRewardOptions()

  def __post_init__(self):
    names = [name for name, _ in self.weights]
    if len(set(names)) < len(names):
      raise ValueError(f"reward_weights = {self.weights}: a reward is named twice")
    if self.held_out in names:
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
    """Those that are rewarded."""
    return tuple(name for name in self.names if name not in (*TEXT_REWARDS, EXTERNAL))

  @property
  def texts(self) -> tuple[str, ...]:
    return tuple(name for name in self.names if name in TEXT_REWARDS)

  @property
  def has_judge(self) -> bool:
    return EXTERNAL in self.names

  def check(self, known_encoders: Collection[str]) -> None:
    """
    Raises:
      ValueError: an encoder that the run does not have.
    """
    unknown = set(self.embedders) - set(known_encoders)
    if unknown:
      raise ValueError(
        f"reward_weights names {sorted(unknown)}: expected embedders of the run ({', '.join(sorted(known_encoders))}), "
        f"text rewards ({', '.join(TEXT_REWARDS)}) or {EXTERNAL!r}"
      )
    if self.held_out and self.held_out not in known_encoders:
      raise ValueError(f"held_out_embedder = {self.held_out!r}: expected one of {', '.join(sorted(known_encoders))}")

  def measure(
    self,
    embed: Callable[[str, jax.Array], jax.Array],
    images: jax.Array,
    painted: jax.Array,
    captions: tuple[jax.Array, jax.Array, jax.Array] | None = None,
  ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """(rewards name -> float32[prompts, rollouts], metrics), all but the judge's.

    Args:
      embed: (encoder name, float[B, H, W, 3] in [-1, 1]) -> unit-norm float32[B, E].
      images: float[prompts, H, W, 3].
      painted: float[prompts * rollouts, H, W, 3], the rollouts of a prompt in a row.
      captions: tokens int32[prompts, rollouts, L], mask and is_closed of it, see `text_reward`; for text rewards.
    """
    held_out = (self.held_out,) if self.held_out else ()
    similarities = cosine_rewards(embed, self.embedders + held_out, images, painted)
    rewards = {name: similarities[name] for name in self.embedders}
    rewards |= {name: text_reward(name, self.text, *captions) for name in self.texts}
    metrics = {"held_out_reward": jnp.mean(similarities[self.held_out])} if self.held_out else {}
    return rewards, metrics

  def advantages(self, rewards: Mapping[str, jax.Array], options: AdvantageOptions) -> tuple[jax.Array, dict]:
    """(advantages float32[prompts, rollouts], metrics) of all rewards, the judge's included."""
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
    if self.has_judge:
      metrics["judge_failures"] = 1.0 - jnp.mean(jnp.isfinite(rewards[EXTERNAL]))
    return values, metrics


def reward_statistics(name: str, rewards: jax.Array) -> dict[str, jax.Array]:
  """Mean of float32[prompts, rollouts] and mean of the std within a group, over what is finite."""
  valid = jnp.isfinite(rewards)
  count = jnp.sum(valid, axis=1, keepdims=True)
  kept = jnp.where(valid, rewards, 0)
  means = jnp.sum(kept, axis=1, keepdims=True) / jnp.maximum(count, 1)
  squares = jnp.sum(jnp.where(valid, jnp.square(rewards - means), 0), axis=1) / jnp.maximum(count[:, 0], 1)
  return {
    name: jnp.sum(kept) / jnp.maximum(jnp.sum(valid), 1),
    f"{name}_std_in_group": jnp.sum(jnp.sqrt(squares)) / jnp.maximum(jnp.sum(count > 0), 1),
  }


def rewarded_embedders(options: RewardOptions) -> dict[str, str]:
  """{field of the options: embedder that it names}, for every embedder that is rewarded or held out."""
  names = [name for name in options.reward_names if name not in (*TEXT_REWARDS, EXTERNAL)]
  found = {f"reward_weights {name!r}": name for name in names}
  return found | ({"held_out_embedder": options.held_out_embedder} if options.held_out_embedder else {})
