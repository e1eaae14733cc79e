"""The step of every supervised stage: contrastive, VAE, captioner, flow matching, cold start."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from uae_jax.training.state import State, apply_gradients

# loss(params, batch, key) -> (float32[], metrics), a mean over the batch.
Loss = Callable[[dict, dict, jax.Array], tuple[jax.Array, dict]]


def make_step(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  *,
  ema_decay: float = 0.0,
  ema_interval: int = 1,
  num_microbatches: int = 1,
):
  """Makes the pure function step(state, batch) -> (state, metrics).

  Args:
    loss: (params, batch, key) -> (mean loss of the batch, metrics).
    optimizer: the optimizer that made `state.opt_state`.
    ema_decay: see `apply_gradients`.
    ema_interval: see `apply_gradients`.
    num_microbatches: number of equal microbatches of a batch, whose gradients are averaged by a scan.
  """

  def value_and_grad(state, batch, key):
    def objective(trainable):
      return loss(state.assemble(trainable), batch, key)

    return jax.value_and_grad(objective, has_aux=True)(state.trainable)

  def step(state: State, batch: dict) -> tuple[State, dict]:
    key = jax.random.fold_in(state.rng, state.step)
    if num_microbatches == 1:
      (value, metrics), grads = value_and_grad(state, batch, key)
    else:
      # Microbatch i takes rows i, i + n, ..., so each device keeps its own rows. The scan holds one set of gradients.
      microbatches = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, num_microbatches, *x.shape[1:]), 0, 1), batch)
      keys = jax.random.split(key, num_microbatches)

      def accumulate(total, inputs):
        outputs, grads = value_and_grad(state, *inputs)
        return jax.tree.map(jnp.add, total, grads), outputs

      grads, outputs = jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, state.trainable), (microbatches, keys))
      grads = jax.tree.map(lambda x: x / num_microbatches, grads)
      value, metrics = jax.tree.map(lambda x: jnp.mean(x, axis=0), outputs)
    state, update_metrics = apply_gradients(
      state, grads, value, optimizer, ema_decay=ema_decay, ema_interval=ema_interval
    )
    return state, {"loss": value, **metrics, **update_metrics}

  return step
