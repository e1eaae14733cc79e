"""The step of every supervised stage: contrastive, VAE, captioner, flow matching, cold start."""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
import optax

from uae_jax.algorithms.losses import Loss, join_metrics
from uae_jax.training.state import State, apply_gradients

# loss(params, batch, keys) -> (`Loss`, metrics as dict name -> (sum, count)), with one PRNG key per row of the batch.
LossFunction = Callable[[dict, dict, jax.Array], tuple[Loss, dict]]


@dataclasses.dataclass(frozen=True)
class WholeBatch:
  """A loss that compares the rows of a batch with each other, so that microbatches would give another loss.

  Attributes:
    loss: the function itself.
  """

  loss: LossFunction

  def __call__(self, params: dict, batch: dict, keys: jax.Array) -> tuple[Loss, dict]:
    return self.loss(params, batch, keys)


def make_step(
  loss: LossFunction,
  optimizer: optax.GradientTransformation,
  *,
  ema_decay: float = 0.0,
  ema_interval: int = 1,
  num_microbatches: int = 1,
):
  """Makes the pure function step(state, batch) -> (state, metrics).

  Loss and gradient do not depend on the number of microbatches: their sums and counts are added and divided once, and
  every row has a key of its own.

  Args:
    loss: see `LossFunction`; the count is constant under differentiation.
    optimizer: the optimizer that made `state.opt_state`.
    ema_decay: see `apply_gradients`.
    ema_interval: see `apply_gradients`.
    num_microbatches: number of equal microbatches of a batch, whose gradients are added by a scan.

  Raises:
    ValueError: the loss needs its whole batch at once, and there are several microbatches.
  """
  if isinstance(loss, WholeBatch) and num_microbatches > 1:
    raise ValueError(f"num_microbatches = {num_microbatches}: this loss needs all rows of its batch at once")

  def gradient(state: State, batch: dict, keys: jax.Array):
    def total(trainable):
      value, metrics = loss(state.assemble(trainable), batch, keys)
      return value.sum, (jax.lax.stop_gradient(value.count), metrics)

    (value, (count, metrics)), grads = jax.value_and_grad(total, has_aux=True)(state.trainable)
    return grads, (value, count, metrics)

  def step(state: State, batch: dict) -> tuple[State, dict]:
    rows = jax.tree.leaves(batch)[0].shape[0]
    inputs = batch, jax.random.split(jax.random.fold_in(state.rng, state.step), rows)
    if num_microbatches == 1:
      grads, (value, count, metrics) = gradient(state, *inputs)
    else:
      # Microbatch i takes rows i, i + n, ..., so each device keeps its own rows. The scan holds one set of gradients.
      microbatches = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, num_microbatches, *x.shape[1:]), 0, 1), inputs)

      def accumulate(total, inputs):
        grads, results = gradient(state, *inputs)
        return jax.tree.map(jnp.add, total, grads), results

      grads, (values, counts, metrics) = jax.lax.scan(
        accumulate, jax.tree.map(jnp.zeros_like, state.trainable), microbatches
      )
      value, count, metrics = jnp.sum(values), jnp.sum(counts), join_metrics(metrics)
    count = jnp.maximum(count, 1e-8)
    grads = jax.tree.map(lambda x: x / count, grads)
    means = {name: total / jnp.maximum(weight, 1e-8) for name, (total, weight) in metrics.items()}
    state, update_metrics = apply_gradients(
      state, grads, value / count, optimizer, ema_decay=ema_decay, ema_interval=ema_interval
    )
    return state, {"loss": value / count, **means, **update_metrics}

  return step
