"""The four phases that both RL stages share, and their composition into one pure step.

    step = update . advantages . reward . rollout

Each phase is jitted separately by default: smaller programs, and external rewards between two of them. `compose` is the
whole step as one function with equal results.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import flax.struct
import jax

from uae_jax.training.state import State


@flax.struct.dataclass
class RewardInputs:
  """What an external reward looks at. Made by a stage's reward phase; read by `rl.external`.

  Attributes:
    tokens: int32[prompts, rollouts or 1, L], captions; 1 where a group has one caption.
    images: uint8[prompts, rollouts, H, W, 3].
  """

  tokens: jax.Array
  images: jax.Array


@dataclasses.dataclass(frozen=True)
class OldPolicy:
  """The slow average that forward-process objectives call the old policy, `State.old`.

  Attributes:
    ceiling: of its decay.
    slope: the decay after n rollouts is min(slope n, ceiling).
    samples: whether rollouts are its own, or those of the policy that learns.
  """

  ceiling: float
  slope: float
  samples: bool


@dataclasses.dataclass(frozen=True)
class Phases:
  """Functions of one RL stage, all pure but the external reward.

  Attributes:
    rollout: (params, batch, key, step) -> trajectory; step int32[] counts updates, for schedules.
    reward: (params, batch, trajectory, key) -> (rewards, metrics); rewards: dict name -> float32[prompts, rollouts].
    advantages: (rewards) -> (float32[prompts, rollouts], metrics).
    update: (state, batch, trajectory, advantages) -> (state, metrics).
    reward_and_inputs: as `reward`, -> ((rewards, metrics), RewardInputs): what `external_reward` reads.
    external_reward: (batch, reward_inputs) -> further rewards, computed on the host; None without.
    old_policy: how `State.old` follows; None without.
  """

  rollout: Callable[[dict, dict, jax.Array, jax.Array], Any]
  reward: Callable[[dict, dict, Any, jax.Array], tuple[dict, dict]]
  advantages: Callable[[dict], tuple[jax.Array, dict]]
  update: Callable[[State, dict, Any, jax.Array], tuple[State, dict]]
  reward_and_inputs: Callable[[dict, dict, Any, jax.Array], tuple[tuple[dict, dict], RewardInputs]] | None = None
  external_reward: Callable[[dict, RewardInputs], dict] | None = None
  old_policy: OldPolicy | None = None

  def sampling_params(self, state: State) -> dict:
    """Parameters of the policy that samples the next rollout."""
    is_old = self.old_policy is not None and self.old_policy.samples
    return state.assemble(state.old) if is_old else state.params


def phase_keys(state: State) -> tuple[jax.Array, jax.Array]:
  """(rollout key, reward key) of the state's next step."""
  rollout_key, reward_key = jax.random.split(jax.random.fold_in(state.rng, state.step))
  return rollout_key, reward_key


def compose(phases: Phases) -> Callable[[State, dict], tuple[State, dict]]:
  """step(state, batch) -> (state, metrics): the four phases as one pure function.

  Raises:
    ValueError: the stage has an external reward.
  """
  if phases.external_reward is not None:
    raise ValueError("a step with an external reward is not one pure function: its phases run separately")

  def step(state: State, batch: dict) -> tuple[State, dict]:
    rollout_key, reward_key = phase_keys(state)
    trajectory = phases.rollout(phases.sampling_params(state), batch, rollout_key, state.step)
    rewards, reward_metrics = phases.reward(state.params, batch, trajectory, reward_key)
    advantages, advantage_metrics = phases.advantages(rewards)
    state, update_metrics = phases.update(state, batch, trajectory, advantages)
    return state, {**reward_metrics, **advantage_metrics, **update_metrics}

  return step
