"""All updates of one rollout: epochs, minibatches, and microbatches whose gradients are added."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from uae_jax.algorithms import ema
from uae_jax.options import UpdateOptions
from uae_jax.training.rl.phases import OldPolicy
from uae_jax.training.state import State, apply_gradients


@flax.struct.dataclass
class UpdateContext:
  """What an objective is told beside its piece.

  Attributes:
    is_first: bool[], whether this is the first update of the rollout: the policy is still the one that sampled.
    part: int32[], which part of the piece's objective is asked for, see `update`.
    prepared: what `prepare` made of the whole minibatch.
  """

  is_first: jax.Array
  part: jax.Array | int = 0
  prepared: Any = None

  def old(self, stored: jax.Array | None, current: jax.Array) -> jax.Array:
    """What the policy that sampled makes of a piece, if that is the policy that learns.

    `stored` comes from a program of its own and may differ from `current` in the last bit. At the first update the two
    are the same by definition, so that the ratio is exactly 1. On policy nothing is stored.
    """
    current = jax.lax.stop_gradient(current)
    return current if stored is None else jnp.where(self.is_first, current, stored)


# objective(params, piece, known) -> (`Loss`, metrics as dict name -> (sum, count)). In metrics named `..._max` the
# "sum" is a maximum and the count 1.
Objective = Callable[[dict, Any, UpdateContext], tuple[tuple[jax.Array, jax.Array], dict]]


def join_metrics(stacked: dict) -> dict:
  """name -> (sum, count) of name -> (sums [pieces], counts [pieces])."""

  def join(name, x):
    return jnp.max(x, axis=0) if name.endswith("_max") else jnp.sum(x, axis=0)

  return {name: tuple(join(name, x) for x in pair) for name, pair in stacked.items()}


def run_updates(
  state: State,
  pieces: Any,
  objective: Objective,
  options: UpdateOptions,
  optimizer: optax.GradientTransformation,
  *,
  ema_decay: float = 0.0,
  old_policy: OldPolicy | None = None,
  prepare: Callable[[dict, Any], Any] | None = None,
  num_parts: int = 1,
) -> tuple[State, dict]:
  """All updates of one rollout.

  The gradients of micro-batches, and of the parts of each, are taken one after the other and added up: activations of
  one part are held at a time, and nothing is computed again for that.

  Args:
    state: before.
    pieces: pytree whose leaves lead with the prompts axis.
    objective: sums and counts, so that micro-batches and devices add exactly; the count is constant under
      differentiation.
    options: epochs, minibatches, micro-batches.
    optimizer: of the stage.
    ema_decay: see `apply_gradients`.
    old_policy: how `state.old` follows after the last update.
    prepare: (params, minibatch as pieces with a leading axis of micro-batches) -> what `objective` must know of the
      whole minibatch; no gradient flows through it.
    num_parts: the objective of a piece is the sum of so many, each asked for by `UpdateContext.part`.

  Returns:
    (state after, metrics). Metrics are means over the updates, maxima where named `..._max`; but
    `log_prob_difference*`, how far replay is from rollout, is of the first update, when both are of the same policy.

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

  def sum_of(trainable, state, piece, known):
    (total, count), metrics = objective(state.assemble(trainable), piece, known)
    return total, (jax.lax.stop_gradient(count), metrics)

  num_gradients = options.num_microbatches * num_parts

  def minibatch(state: State, pair):
    micro, is_first = pair
    known = UpdateContext(is_first)
    if prepare is not None:
      known = known.replace(prepared=jax.lax.stop_gradient(prepare(state.params, micro)))

    def gradient(i):
      piece = jax.tree.map(lambda x: x[i // num_parts], micro)
      value_and_grad = jax.value_and_grad(sum_of, has_aux=True)
      (total, (count, metrics)), grads = value_and_grad(
        state.trainable, state, piece, known.replace(part=i % num_parts)
      )
      return grads, (total, count, metrics)

    def accumulate(grads, i):
      more, results = gradient(i)
      return jax.tree.map(jnp.add, grads, more), results

    if num_gradients == 1:
      grads, (total, count, metrics) = gradient(0)
    else:
      zeros = jax.tree.map(jnp.zeros_like, state.trainable)
      grads, (totals, counts, metrics) = jax.lax.scan(accumulate, zeros, jnp.arange(num_gradients))
      total, count, metrics = jnp.sum(totals), jnp.sum(counts), join_metrics(metrics)
    count = jnp.maximum(count, 1e-8)
    loss = total / count
    state, update_metrics = apply_gradients(
      state, jax.tree.map(lambda g: g / count, grads), loss, optimizer, ema_decay=ema_decay
    )
    means = {name: value / jnp.maximum(weight, 1e-8) for name, (value, weight) in metrics.items()}
    return state, {"loss": loss, **means, **update_metrics}

  # The state counts rollouts in `step`; each optimizer step inside keeps its own count in opt_state.
  first_step = state.step
  if options.is_on_policy:
    state, metrics = minibatch(state, (jax.tree.map(lambda x: x[0], cut), jnp.bool_(True)))
  else:
    order = jax.tree.map(lambda x: jnp.concatenate([x] * options.num_epochs), cut)
    is_first = jnp.arange(options.num_epochs * options.num_minibatches) == 0
    state, stacked = jax.lax.scan(minibatch, state, (order, is_first))
    metrics = {name: _over_updates(name, values) for name, values in stacked.items()}
  if old_policy is not None:
    decay = ema.linear_decay(first_step, old_policy.slope, old_policy.ceiling)
    state = state.replace(old=ema.update(state.old, state.trainable, decay))
  return state.replace(step=first_step + 1), metrics


def _over_updates(name: str, values: jax.Array) -> jax.Array:
  """One number of a metric's float32[updates]."""
  if name.startswith("log_prob_difference"):
    return values[0]
  if name == "skipped_in_a_row":
    return values[-1]
  return jnp.max(values) if name.endswith("_max") else jnp.mean(values)
