"""All updates from one rollout: epochs, minibatches, and microbatches whose gradients are added."""

from collections.abc import Callable
import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from uae_jax.algorithms import ema
from uae_jax.algorithms.losses import join_metrics
from uae_jax.options import ReferenceOptions, UpdateOptions
from uae_jax.training.rl.phases import OldPolicy
from uae_jax.training.state import State, apply_gradients


@flax.struct.dataclass
class UpdateContext:
  """Context passed to an objective with each microbatch.

  Made by `run_updates`; read by the objectives of stages 2 and 3.

  Attributes:
    is_first: bool[], whether this is the first update of the rollout: the policy is still the one that sampled.
    part: int32[], index of the part of the objective to compute, in 0..num_parts - 1; see `run_updates`.
    prepared: result of `prepare` on the whole minibatch; None without `prepare`.
  """

  is_first: jax.Array
  part: jax.Array | int = 0
  prepared: Any = None

  def old(self, stored: jax.Array | None, current: jax.Array) -> jax.Array:
    """Returns the old-policy values for this microbatch; on the first update these are the current ones.

    Valid if the policy that sampled is the policy that learns, before its updates. `stored` comes from a separate
    program and may differ from `current` in the last bit. On the first update the two are equal by definition, so the
    ratio is exactly 1. On policy `stored` is None, and the result is `current`.
    """
    current = jax.lax.stop_gradient(current)
    return current if stored is None else jnp.where(self.is_first, current, stored)


# objective(params, microbatch, context) -> (`Loss`, metrics as dict name -> (sum, count)). In metrics named `..._max`
# the "sum" is a maximum and the count 1.
Objective = Callable[[dict, Any, UpdateContext], tuple[tuple[jax.Array, jax.Array], dict]]


def run_updates(
  state: State,
  rollout: Any,
  objective: Objective,
  options: UpdateOptions,
  optimizer: optax.GradientTransformation,
  *,
  ema_decay: float = 0.0,
  ema_interval: int = 1,
  reference: ReferenceOptions | None = None,
  old_policy: OldPolicy | None = None,
  prepare: Callable[[dict, Any], Any] | None = None,
  num_parts: int = 1,
) -> tuple[State, dict]:
  """Performs all updates from one rollout.

  The gradients of microbatches, and of the parts of each, are computed one after the other and added: only the
  activations of one part are held at a time, and nothing is recomputed for that.

  Args:
    state: state before the rollout's first update.
    rollout: pytree; the first axis of every leaf is prompts.
    objective: returns sums and counts, so that microbatches and devices add exactly; the count is constant under
      differentiation.
    options: numbers of epochs, minibatches and microbatches.
    optimizer: the optimizer that made `state.opt_state`.
    ema_decay: see `apply_gradients`.
    ema_interval: see `apply_gradients`.
    reference: update rule of `state.reference`, applied after the last update; None leaves it as it is.
    old_policy: update rule of `state.old`, applied once, after the last update; None leaves `state.old` as it is.
    prepare: (params, minibatch with a leading axis of microbatches) -> `UpdateContext.prepared`, for values that depend
      on the whole minibatch; no gradient flows through it.
    num_parts: number of parts whose sum is the objective of a microbatch; `UpdateContext.part` selects one.

  Returns:
    (state after, metrics). Metrics are means over the updates, or maxima where named `..._max`. The exception is
    `*log_prob_difference*`, the difference between replay and rollout: it is that of the first update, when both use
    the same policy.

  Raises:
    ValueError: the number of prompts is not divisible.
  """
  num_prompts = jax.tree.leaves(rollout)[0].shape[0]
  cuts = options.num_minibatches * options.num_microbatches
  if num_prompts % cuts:
    raise ValueError(
      f"{num_prompts} prompts are not divisible by num_minibatches * num_microbatches = {cuts}: change batch_size"
    )
  # Microbatch i takes rows i, i + cuts, ...: with prompts sharded in blocks, each device keeps its own rows.
  microbatches = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, cuts, *x.shape[1:]), 0, 1), rollout)
  shape = (options.num_minibatches, options.num_microbatches)
  minibatches = jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), microbatches)

  def sum_of(trainable, state, microbatch, known):
    (total, count), metrics = objective(state.assemble(trainable), microbatch, known)
    return total, (jax.lax.stop_gradient(count), metrics)

  num_gradients = options.num_microbatches * num_parts
  # `state.step` counts rollouts; only between the updates of one rollout does it count these.
  first_step = state.step

  def minibatch(state: State, pair):
    microbatches, is_first = pair
    known = UpdateContext(is_first)
    if prepare is not None:
      known = dataclasses.replace(known, prepared=jax.lax.stop_gradient(prepare(state.params, microbatches)))

    def gradient(i):
      microbatch = jax.tree.map(lambda x: x[i // num_parts], microbatches)
      value_and_grad = jax.value_and_grad(sum_of, has_aux=True)
      (total, (count, metrics)), grads = value_and_grad(
        state.trainable, state, microbatch, dataclasses.replace(known, part=i % num_parts)
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
    grads = jax.tree.map(lambda g: g / count, grads)
    state, update_metrics = apply_gradients(
      state,
      grads,
      loss,
      optimizer,
      ema_decay=ema_decay,
      ema_interval=ema_interval,
      optimizer_step=first_step * options.num_updates + (state.step - first_step),
    )
    means = {name: value / jnp.maximum(weight, 1e-8) for name, (value, weight) in metrics.items()}
    return state, {"loss": loss, **means, **update_metrics}

  if options.is_on_policy:
    state, metrics = minibatch(state, (jax.tree.map(lambda x: x[0], minibatches), jnp.bool_(True)))
  else:
    order = jax.tree.map(lambda x: jnp.concatenate([x] * options.num_epochs), minibatches)
    is_first = jnp.arange(options.num_updates) == 0
    state, stacked = jax.lax.scan(minibatch, state, (order, is_first))
    metrics = {name: _over_updates(name, values) for name, values in stacked.items()}
  if old_policy is not None:
    decay = ema.linear_decay(first_step, old_policy.slope, old_policy.ceiling, old_policy.start)
    state = dataclasses.replace(state, old=ema.update(state.old, state.trainable, decay))
  if reference is not None and reference.interval:
    decay = jnp.where(ema.is_due(first_step, reference.interval), 1.0 - reference.alpha, 1.0)
    state = dataclasses.replace(state, reference=ema.update(state.reference, state.trainable, decay))
  return dataclasses.replace(state, step=first_step + 1), metrics


def _over_updates(name: str, values: jax.Array) -> jax.Array:
  """Reduces a metric float32[updates] to float32[]."""
  if "log_prob_difference" in name:
    return values[0]
  if name == "skipped_in_a_row":
    return values[-1]
  return jnp.max(values) if name.endswith("_max") else jnp.mean(values)
