"""What both RL stages share: the four phases, their composition into one pure step, and the loop of updates over a
rollout.

    step = update . advantages . reward . rollout

Phases are jitted apart by default (smaller programs, rewards on the host possible); `compose` is the whole as one
function, with equal results.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from uae_jax.training.state import State, apply_gradients


@dataclasses.dataclass(frozen=True)
class Phases:
  """Pure functions of one RL stage.

  Attributes:
    rollout: (params, batch, key, step) -> trajectory; step int32[] counts updates, for schedules.
    reward: (params, batch, trajectory, key) -> (rewards, metrics); rewards: dict name -> float32[prompts, rollouts].
    advantages: (rewards) -> (float32[prompts, rollouts], metrics).
    update: (state, batch, trajectory, advantages) -> (state, metrics).
  """

  rollout: Callable[[dict, dict, jax.Array, jax.Array], Any]
  reward: Callable[[dict, dict, Any, jax.Array], tuple[dict, dict]]
  advantages: Callable[[dict], tuple[jax.Array, dict]]
  update: Callable[[State, dict, Any, jax.Array], tuple[State, dict]]


def phase_keys(state: State) -> tuple[jax.Array, jax.Array]:
  """(rollout key, reward key) of the state's next step."""
  rollout_key, reward_key = jax.random.split(jax.random.fold_in(state.rng, state.step))
  return rollout_key, reward_key


def compose(phases: Phases) -> Callable[[State, dict], tuple[State, dict]]:
  """step(state, batch) -> (state, metrics): the four phases as one pure function."""

  def step(state: State, batch: dict) -> tuple[State, dict]:
    rollout_key, reward_key = phase_keys(state)
    trajectory = phases.rollout(state.params, batch, rollout_key, state.step)
    rewards, reward_metrics = phases.reward(state.params, batch, trajectory, reward_key)
    advantages, advantage_metrics = phases.advantages(rewards)
    state, update_metrics = phases.update(state, batch, trajectory, advantages)
    return state, {**reward_metrics, **advantage_metrics, **update_metrics}

  return step


@dataclasses.dataclass(frozen=True)
class UpdateOptions:
  """How one rollout is used.

  Attributes:
    num_epochs: passes over the rollout.
    num_minibatches: optimizer steps a pass; must divide the number of prompts.
    num_microbatches: pieces of a minibatch whose gradients are added.
  """

  num_epochs: int = 1
  num_minibatches: int = 1
  num_microbatches: int = 1

  @property
  def is_on_policy(self) -> bool:
    """One update a rollout: the policy that sampled is the policy that learns, and the ratio is 1 by definition."""
    return self.num_epochs * self.num_minibatches == 1


# objective(params, piece) -> ((sum, count) of the loss, metrics as dict name -> (sum, count)).
Objective = Callable[[dict, Any], tuple[tuple[jax.Array, jax.Array], dict]]


def update(
  state: State,
  pieces: Any,
  objective: Objective,
  options: UpdateOptions,
  optimizer: optax.GradientTransformation,
  *,
  ema_decay: float = 0.0,
) -> tuple[State, dict]:
  """All updates of one rollout.

  Args:
    state: before.
    pieces: pytree whose leaves lead with the prompts axis.
    objective: sums and counts, so that micro-batches and devices add exactly; the count is constant under
      differentiation.
    options: epochs, minibatches, micro-batches.
    optimizer: of the stage.
    ema_decay: see `apply_gradients`.

  Returns:
    (state after, metrics of the last update).

  Raises:
    ValueError: the number of prompts is not divisible.
  """
  num_prompts = jax.tree.leaves(pieces)[0].shape[0]
  cuts = options.num_minibatches * options.num_microbatches
  if num_prompts % cuts:
    raise ValueError(
      f"{num_prompts} prompts are not divisible by num_minibatches * num_microbatches = {cuts}: change batch_size"
    )
  # Piece i of every cut takes rows i, i + cuts, ...: with prompts sharded in blocks each device keeps its own rows.
  cut = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, cuts, *x.shape[1:]), 0, 1), pieces)
  cut = jax.tree.map(lambda x: x.reshape(options.num_minibatches, options.num_microbatches, *x.shape[1:]), cut)

  def sum_of(trainable, state, piece):
    (total, count), metrics = objective(state.assemble(trainable), piece)
    return total, (jax.lax.stop_gradient(count), metrics)

  def minibatch(state: State, micro):
    def accumulate(_, piece):
      (total, (count, metrics)), grads = jax.value_and_grad(sum_of, has_aux=True)(state.trainable, state, piece)
      return None, (total, count, metrics, grads)

    if options.num_microbatches == 1:
      _, results = accumulate(None, jax.tree.map(lambda x: x[0], micro))
    else:
      _, results = jax.lax.scan(accumulate, None, micro)
      results = jax.tree.map(lambda x: jnp.sum(x, axis=0), results)
    total, count, metrics, grads = results
    count = jnp.maximum(count, 1e-8)
    loss = total / count
    state, update_metrics = apply_gradients(
      state, jax.tree.map(lambda g: g / count, grads), loss, optimizer, ema_decay=ema_decay
    )
    means = {name: value / jnp.maximum(weight, 1e-8) for name, (value, weight) in metrics.items()}
    return state, {"loss": loss, **means, **update_metrics}

  # The state counts rollouts in `step`; each optimizer step inside keeps its own count in opt_state.
  first_step = state.step
  metrics = {}
  if options.is_on_policy:
    state, metrics = minibatch(state, jax.tree.map(lambda x: x[0], cut))
  else:
    order = jax.tree.map(lambda x: jnp.concatenate([x] * options.num_epochs), cut)
    state, stacked = jax.lax.scan(minibatch, state, order)
    metrics = jax.tree.map(lambda x: x[-1], stacked)
  return state.replace(step=first_step + 1), metrics
