"""FLOPs of a program equal its formula, for any loops, gradients and devices."""

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import pytest

from uae_jax import sharding
from uae_jax.training.flops import Program, matrix_flops

pytestmark = pytest.mark.fast

A, B, C = 4, 6, 8
X, W = jnp.ones((A, B)), jnp.ones((B, C))
SQUARE = jnp.ones((B, B))
PRODUCT = 2 * A * B * C
STEP = 2 * A * B * B


def chain(x, length):
  return jax.lax.scan(lambda x, _: (x @ SQUARE, None), x, length=length)[0]


def recomputed(x):
  return jnp.sum(jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ SQUARE) @ SQUARE))(x))


def sampled(x):
  return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ SQUARE), (0, x))[1]


def until(x, stop):
  return jax.lax.fori_loop(0, stop, lambda _, x: x @ SQUARE, x)


def on_all_devices(x):
  mesh = sharding.make_mesh(4, 2, 1)
  rows = PartitionSpec(("data", "fsdp"))
  return jax.shard_map(lambda x: x @ SQUARE, mesh=mesh, in_specs=rows, out_specs=rows)(x)


def kernel(x):
  def body(x, y):
    y[...] = x[...] @ jnp.ones((B, B))

  block = pl.BlockSpec((2, B), lambda i: (i, 0))
  shape = jax.ShapeDtypeStruct((A, B), jnp.float32)
  return pl.pallas_call(body, shape, grid=(A // 2,), in_specs=[block], out_specs=block, interpret=True)(x)


CONVOLUTION = 2 * (1 * 4 * 4 * 5) * (3 * 3 * 2)


def convolution(x):
  images, weights = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 5))
  return jax.lax.conv_general_dilated(images, weights, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize(
  ("function", "args", "expected"),
  [
    (jnp.matmul, (X, W), PRODUCT),
    (lambda x, w: jnp.einsum("nab,nbc->nac", jnp.stack([x] * 3), jnp.stack([w] * 3)), (X, W), 3 * PRODUCT),
    (lambda x: chain(x, 7), (X,), 7 * STEP),
    (lambda x: jax.lax.map(lambda row: chain(row[None], 2), x), (X,), 2 * STEP),
    # The backward pass of a product has two products, or one if only one operand is trained.
    (jax.value_and_grad(lambda x: jnp.sum(chain(x, 7))), (X,), 2 * 7 * STEP),
    (jax.grad(lambda w: jnp.sum(jnp.sin(jnp.tanh(X @ w) @ W))), (SQUARE,), 2 * STEP + 2 * PRODUCT),
    (jax.grad(recomputed), (X,), (2 + 2 + 2) * STEP),
    (lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: chain(x, 2), lambda x: chain(x, 5), x), (X,), 5 * STEP),
    (sampled, (X,), 3 * STEP),
    (until, (X, 2), 5 * STEP),
    (lambda x, stop: until(until(sampled(x), stop), stop), (X, 2), (3 + 5 + 7) * STEP),
    (on_all_devices, (jnp.ones((16, B)),), 2 * 16 * B * B),
    (kernel, (X,), STEP),
    (convolution, (X,), CONVOLUTION),
  ],
)
def test_flops_are_those_of_the_formula(function, args, expected):
  assert matrix_flops(jax.make_jaxpr(function)(*args).jaxpr, iter((5.0, 7.0))) == expected


def test_a_program_is_its_function_and_is_traced_once():
  traces = []

  def function(x):
    traces.append(None)
    return chain(x, 7)

  program = Program(function, donate_argnums=0)
  assert program.flops == 0.0
  result = program(jnp.copy(X))
  program(jnp.copy(X))
  assert jnp.array_equal(result, chain(X, 7))
  assert program.flops == 7 * STEP
  assert len(traces) == 1


def test_a_program_counts_every_shape_of_its_arguments():
  traces = []

  def function(x):
    traces.append(None)
    return chain(x, 7)

  program = Program(function)
  counts = []
  for rows in (X, jnp.concatenate([X, X]), X):
    program(rows)
    counts.append(program.flops)
  assert counts == [7 * STEP, 14 * STEP, 7 * STEP]
  assert len(traces) == 2
