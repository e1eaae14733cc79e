"""The four phases of an RL step, shared by both RL stages, and their composition into one pure function.

    step = update . advantages . reward . rollout

By default each phase is jitted separately: the programs are smaller, and an external reward can run between two of
them. `compose` returns the step as one function with equal results.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax

from uae_jax.training.rl import pieces
from uae_jax.training.rl.host_rewards import HostReward, RewardInputs
from uae_jax.training.state import State


@dataclasses.dataclass(frozen=True)
class OldPolicy:
  """Update rule of `State.old`, the slow average that forward-process objectives call the old policy.

  Made by `old_policy` of `stages.understanding_for_generation`; read by `Phases.sampling_params` and
  `rl.update.run_updates`.

  Attributes:
    ceiling: upper bound of the decay, in (0, 1).
    slope: growth of the decay per rollout; after n rollouts it is min(slope max(n - start, 0), ceiling).
    start: number of rollouts before the decay grows.
    samples: whether the slow average samples the rollouts, instead of the policy that learns.
  """

  ceiling: float
  slope: float
  start: int
  samples: bool


@dataclasses.dataclass(frozen=True)
class Phases:
  """Functions of one RL stage; all are pure except the rewards on the host.

  Made by the `make_phases` of stages 2 and 3; read by `compose`, by `training.stage.phased_step` and by planning.

  Attributes:
    rollout: (params, batch, key, step) -> trajectory, a `CaptionGroups` or `ImageGroups`; step int32[] is the number of
      earlier rollouts, for schedules. For a step in pieces a fifth argument, piece int32[]: what is drawn once per step
      is the same for all pieces, everything else differs.
    reward: (params, batch, trajectory, key) -> (rewards, metrics); rewards: dict name -> float32[prompts, rollouts].
    advantages: (rewards) -> (float32[prompts, rollouts], metrics), or a tuple of arrays instead, which only `update`
      reads.
    update: (state, batch, trajectory, advantages) -> (state, metrics).
    reward_and_inputs: like `reward`, but returns ((rewards, metrics), `RewardInputs` for `external_reward`).
    host_rewards: further rewards, computed on the host.
    num_pieces: pieces in which the prompts of a step are generated; see `ExternalRewardOptions`.
    join: trajectories of all pieces -> that of the step.
    old_policy: update rule of `State.old`; None for a stage without a slow average.
    moves_reference: whether the reference of the KL is `State.reference`.
  """

  rollout: Callable[..., Any]
  reward: Callable[[dict, dict, Any, jax.Array], tuple[dict, dict]]
  advantages: Callable[[dict], tuple[Any, dict]]
  update: Callable[[State, dict, Any, Any], tuple[State, dict]]
  reward_and_inputs: Callable[[dict, dict, Any, jax.Array], tuple[tuple[dict, dict], RewardInputs]] | None = None
  host_rewards: tuple[HostReward, ...] = ()
  num_pieces: int = 1
  join: Callable[[Sequence[Any]], Any] = pieces.join
  old_policy: OldPolicy | None = None
  moves_reference: bool = False

  def sampling_params(self, state: State) -> dict:
    """Returns the parameters of the policy that samples the next rollout."""
    is_old = self.old_policy is not None and self.old_policy.samples
    return state.assemble(state.old) if is_old else state.params


def phase_keys(state: State) -> tuple[jax.Array, jax.Array]:
  """Returns (rollout key, reward key) of the state's next step."""
  rollout_key, reward_key = jax.random.split(jax.random.fold_in(state.rng, state.step))
  return rollout_key, reward_key


def compose(phases: Phases) -> Callable[[State, dict], tuple[State, dict]]:
  """Composes the four phases into one pure function step(state, batch) -> (state, metrics).

  Raises:
    ValueError: the stage has a reward that is computed on the host, such as an external reward.
  """
  if phases.host_rewards:
    names = ", ".join(reward.name for reward in phases.host_rewards)
    raise ValueError(f"a step with an external reward ({names}) is not one pure function: its phases run separately")

  def step(state: State, batch: dict) -> tuple[State, dict]:
    rollout_key, reward_key = phase_keys(state)
    trajectory = phases.rollout(phases.sampling_params(state), batch, rollout_key, state.step)
    rewards, reward_metrics = phases.reward(state.params, batch, trajectory, reward_key)
    advantages, advantage_metrics = phases.advantages(rewards)
    state, update_metrics = phases.update(state, batch, trajectory, advantages)
    return state, {**reward_metrics, **advantage_metrics, **update_metrics}

  return step
