"""The state of a stage, and the update of a state by gradients."""

from collections.abc import Callable
import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import optax

from uae_jax import trees
from uae_jax.algorithms import ema
from uae_jax.training.optimizer import spikes_skipped

_LOSS_DECAY = 0.99


@flax.struct.dataclass
class State:
  """Complete state of a stage, sufficient to resume it together with the position in the data.

  Attributes:
    step: int32[], number of steps done so far, with skipped ones; in RL stages one step is one rollout.
    trainable: nested dict, float32 master copy of the parameters that this stage trains.
    frozen: nested dict of all other parameters.
    opt_state: optax state of `trainable`.
    ema: moving average of `trainable`, or an empty dict.
    skipped: int32[], number of most recent updates skipped in a row because loss or gradient was not finite.
    loss_average: float32[], moving average of the loss over about a hundred updates; NaN before the first.
    rng: key of the stage; a step uses `fold_in(rng, step)`.
    dtypes: dtypes of the trainable parameters in the networks, in the order of the leaves of `trainable`.
    old: slow average of `trainable` for forward-process objectives, see `rl.phases.OldPolicy`; or an empty dict.
    reference: moving reference of the KL, see `options.ReferenceOptions`; or an empty dict, if it is fixed.
  """

  step: jax.Array
  trainable: dict
  frozen: dict
  opt_state: optax.OptState
  ema: dict
  skipped: jax.Array
  loss_average: jax.Array
  rng: jax.Array
  dtypes: tuple[jnp.dtype, ...] = flax.struct.field(pytree_node=False)
  old: dict = flax.struct.field(default_factory=dict)
  reference: dict = flax.struct.field(default_factory=dict)

  def assemble(self, trainable: dict) -> dict:
    """Returns all parameters of the networks: `trainable`, cast to the networks' dtypes, and the frozen ones."""
    leaves, structure = jax.tree.flatten(trainable)
    cast = [leaf.astype(dtype) for leaf, dtype in zip(leaves, self.dtypes, strict=True)]
    return trees.merge(jax.tree.unflatten(structure, cast), self.frozen)

  @property
  def params(self) -> dict:
    return self.assemble(self.trainable)

  @property
  def averaged_params(self) -> dict:
    """All parameters, averaged if the state has a moving average; for evaluation and for the next stage."""
    return self.assemble(self.ema or self.trainable)


def create(
  params: dict,
  is_trainable: Callable[[str], bool],
  optimizer: optax.GradientTransformation,
  rng: jax.Array,
  *,
  has_ema: bool,
  has_old: bool = False,
  has_reference: bool = False,
) -> State:
  """Makes the first state of a stage, with a float32 master copy of the trainable parameters.

  Args:
    params: all parameters.
    is_trainable: path of a parameter -> whether the stage trains it.
    optimizer: optimizer of the stage.
    rng: key of the stage.
    has_ema: whether to keep a moving average of the trainable parameters.
    has_old: whether to keep the slow average `State.old`.
    has_reference: whether to keep the moving reference `State.reference`.

  Raises:
    ValueError: no parameter is trainable.
  """
  trainable, frozen = trees.split(params, is_trainable)
  if not trainable:
    raise ValueError("the stage trains no parameter: check its `trainable` pattern and config.model's adapters")
  dtypes = tuple(leaf.dtype for leaf in jax.tree.leaves(trainable))
  trainable = trees.cast(trainable, jnp.float32)
  return State(
    step=jnp.int32(0),
    trainable=trainable,
    frozen=frozen,
    opt_state=optimizer.init(trainable),
    ema=jax.tree.map(jnp.copy, trainable) if has_ema else {},
    skipped=jnp.int32(0),
    loss_average=jnp.full((), jnp.nan, jnp.float32),
    rng=rng,
    dtypes=dtypes,
    old=jax.tree.map(jnp.copy, trainable) if has_old else {},
    reference=jax.tree.map(jnp.copy, trainable) if has_reference else {},
  )


def release(old, *kept) -> None:
  """Deletes the device buffers of `old`, even if they are referenced elsewhere, except those also in `kept`."""
  ids = {id(leaf) for leaf in jax.tree.leaves(kept)}
  for leaf in jax.tree.leaves(old):
    if id(leaf) not in ids:
      leaf.delete()


def apply_gradients(
  state: State,
  grads: dict,
  loss: jax.Array,
  optimizer: optax.GradientTransformation,
  *,
  ema_decay: float = 0.0,
  ema_interval: int = 1,
  optimizer_step: jax.Array | None = None,
) -> tuple[State, dict]:
  """Performs one optimizer step; skips it if loss or gradient is not finite.

  Args:
    state: state before the step.
    grads: gradients of the loss with respect to `state.trainable`.
    loss: float32[]; checked for being finite and added to `loss_average`.
    optimizer: the optimizer that made `state.opt_state`.
    ema_decay: upper bound of the decay of `state.ema`; unused if that is empty.
    ema_interval: optimizer steps between two updates of `state.ema`.
    optimizer_step: int32[], number of optimizer steps before this one; None for `state.step`.

  Returns:
    (state after, {"grad_norm", "skipped_in_a_row", and "spikes_skipped" if the optimizer skips spikes}).
  """
  norm = optax.tree.norm(grads)
  is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
  trainable = optax.apply_updates(state.trainable, updates)

  def keep(new, old):
    return jax.tree.map(lambda n, o: jnp.where(is_finite, n, o), new, old)

  trainable = keep(trainable, state.trainable)
  average = state.ema
  if average:
    n = state.step if optimizer_step is None else optimizer_step
    decay = jnp.where(ema.is_due(n, ema_interval), ema.warmup_decay(n, ema_decay), 1.0)
    average = keep(ema.update(average, trainable, decay), average)
  skipped = jnp.where(is_finite, 0, state.skipped + 1)
  opt_state = keep(opt_state, state.opt_state)
  followed = state.loss_average + (1.0 - _LOSS_DECAY) * (loss - state.loss_average)
  loss_average = keep(jnp.where(jnp.isnan(state.loss_average), loss, followed), state.loss_average)
  state = dataclasses.replace(
    state,
    step=state.step + 1,
    trainable=trainable,
    opt_state=opt_state,
    ema=average,
    skipped=skipped,
    loss_average=loss_average,
  )
  return state, {
    "grad_norm": norm,
    "skipped_in_a_row": skipped.astype(jnp.float32),
    **spikes_skipped(opt_state),
  }
