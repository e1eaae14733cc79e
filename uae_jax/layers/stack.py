"""Identical layers stacked on a leading axis and run by one scan: compile time does not depend on depth."""

from collections.abc import Callable

from flax import nnx
import jax
import jax.numpy as jnp

REMAT_POLICIES = {
  "none": None,  # keep every activation
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
  """`depth` copies of `make(rngs)` as one module whose leaves have a leading `layers` axis."""
  return nnx.vmap(nnx.transform_metadata(make, partition="layers"))(rngs.split(depth))


def unstack(layers: nnx.Module) -> nnx.List:
  """The layers of a module made by `stack` as a list, for loops that would otherwise slice the stack every time."""
  graphdef, state = nnx.split(layers)
  depth = jax.tree.leaves(state)[0].shape[0]
  return nnx.List(nnx.merge(graphdef, _slice(state, i)) for i in range(depth))


def _slice(tree, i: int):
  return jax.tree.map(lambda x: x[i], tree)


def scan_layers(body: Callable, carry, layers: nnx.Module, xs=None, *, remat: str = "none", unroll: int | bool = 1):
  """Runs `carry, y = body(carry, layer, x)` over stacked layers.

  Layers all-gather their own weights (`layers.lora.Linear`) inside the loop, and again in a rematerialized backward
  pass. A differentiated loop around this one would undo that, see `rollouts.images.one_by_one`.

  Args:
    body: takes the carry, one unstacked layer and this layer's slice of `xs`; returns (carry, y).
    carry: pytree of fixed shapes and dtypes.
    layers: a module made by `stack`, or the list that `unstack` returns, which always runs unrolled.
    xs: pytree whose leaves have a leading layers axis, or None.
    remat: a key of `REMAT_POLICIES`: which activations of a layer are saved for the backward pass.
    unroll: as in `jax.lax.scan`; `True` unrolls all layers, which is faster on CPU for few layers.

  Returns:
    (carry, ys stacked on the layers axis).
  """
  if isinstance(layers, nnx.List):
    ys = []
    for i, layer in enumerate(layers):
      carry, y = body(carry, layer, _slice(xs, i))
      ys.append(y)
    return carry, jax.tree.map(lambda *y: jnp.stack(y), *ys)
  graphdef, state = nnx.split(layers)

  def step(carry, layer_and_x):
    layer_state, x = layer_and_x
    return body(carry, nnx.merge(graphdef, layer_state), x)

  policy = REMAT_POLICIES[remat]
  if policy is not None:
    step = jax.checkpoint(step, policy=policy, prevent_cse=False)
  return jax.lax.scan(step, carry, (state, xs), unroll=unroll)
