"""Work counted from a trace equals a formula, including loops and sharding."""

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

from uae_jax import sharding
from uae_jax.layers.quantized import Int8Weight, product
from uae_jax.models.mmdit import MMDiT, MMDiTConfig
from uae_jax.planning import cost
from uae_jax.planning.chips import CHIPS
from uae_jax.training.flops import matrix_flops

CHIP = CHIPS["v5e"]


def count(function, arguments, is_batch, *, trips=(), **axes):
  return cost.count(jax.jit(function).trace(*arguments), is_batch, CHIP, sharding.make_mesh(**axes), trips)


def array(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


def test_a_scan_counts_every_turn_and_a_weight_is_whole_on_every_row():
  """x [B, D] through L layers of [D, D] takes 2 B D^2 L FLOPs over all chips, and each chip reads complete weights."""
  rows, width, depth = 64, 32, 6

  def run(x, weights):
    return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]

  work = count(run, (array(rows, width), array(depth, width, width)), (True, False), data=2, fsdp=4)
  assert work.flops == 2 * rows * width**2 * depth / 8
  assert work.bytes == 2 * depth * (width**2 + 2 * rows * width / 8)
  assert work.seconds == pytest.approx(max(work.flops / CHIP.flops, work.bytes / CHIP.hbm_bandwidth))


@pytest.mark.parametrize(("rounds", "rate"), [(True, CHIP.int8_flops), (False, CHIP.flops)])
def test_products_with_int8_have_their_own_peak_and_read_a_byte_per_weight(rounds, rate):
  """With rounded activations the forward product is int8 with int8; the backward one reads int8 as bfloat16."""
  rows, width = 2**17, 4096
  weight = Int8Weight(array(width, width, dtype=jnp.int8), array(1, width, dtype=jnp.float32), rounds)
  flags = (True, False, False)

  def forward(x, weight):
    return product(x, weight, (None, None))

  def backward(x, weight):
    return jax.vjp(lambda x: forward(x, weight), x)[1](x)

  ahead = count(forward, (array(rows, width), weight), flags, fsdp=8)
  assert ahead.flops == 2 * rows * width**2 / 8
  assert ahead.seconds == pytest.approx(ahead.flops / rate)
  both = count(backward, (array(rows, width), weight), flags, fsdp=8)
  assert both.seconds - ahead.seconds == pytest.approx(ahead.flops / CHIP.flops)
  few = count(forward, (array(8, width), weight), flags, fsdp=8)
  assert few.seconds == pytest.approx(width**2 / CHIP.hbm_bandwidth, rel=0.01)
  assert CHIPS["v4"].int8_flops is None and CHIPS["tpu7x"].device.int8_flops is None


def test_tensor_cuts_weights_too():
  work = count(lambda x, w: x @ w, (array(64, 32), array(32, 32)), (True, False), data=1, fsdp=4, tensor=2)
  assert work.flops == 2 * 64 * 32 * 32 / 8
  assert work.bytes == 2 * (32 * 32 / 2 + 2 * 64 * 32 / 8)


def test_loops_with_and_without_a_known_end():
  """The first loop has a bound in the trace; the trip count of the second is known only to the caller."""

  def run(x, w, start):
    def body(carry):
      t, x = carry
      return t + 1, x @ w

    _, x = jax.lax.while_loop(lambda carry: (carry[0] < 5) & jnp.any(carry[1] > 0), body, (0, x))
    return jax.lax.fori_loop(start, 9, lambda _, x: x @ w, x)

  arguments = (array(8, 4), array(4, 4), array(dtype=jnp.int32))
  once = 2 * 8 * 4 * 4 / 8
  assert count(run, arguments, (True, False, False), trips=(3,), fsdp=8).flops == (5 + 3) * once


def test_what_enters_a_carry_later_is_of_the_batch():
  """The carry starts as a constant and depends on the batch after the first iteration."""

  def run(x, w):
    return jax.lax.scan(lambda c, _: (c @ w + x, None), jnp.zeros_like(x), None, length=3)[0]

  assert count(run, (array(8, 4), array(4, 4)), (True, False), fsdp=8).flops == 3 * 2 * 8 * 4 * 4 / 8


def test_the_decoder_costs_what_its_formula_says():
  """The formula has, per block, modulations, projections, attention, output and MLP of both streams."""
  config = MMDiTConfig(
    depth=3, num_heads=2, head_width=8, patch=2, context_width=24, pooled_width=12, pos_embed_max_size=8, sample_size=8
  )
  batch, side, tokens = 2, 8, 5
  graphdef, state = nnx.split(nnx.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0))))
  arguments = (state, *(array(*s) for s in ((batch, side, side, 16), (batch,), (batch, tokens, 24), (batch, 12))))
  traced = jax.jit(lambda state, *x: nnx.merge(graphdef, state)(*x)).trace(*arguments)
  flags = [False] * len(jax.tree.leaves(state)) + [True] * 4
  work = cost.count(traced, flags, CHIP, sharding.make_mesh(devices=jax.devices()[:1]))

  d, patch_values, image = config.width, 64, (side // 2) ** 2
  whole = image + tokens
  vectors = 256 * d + d * d + 12 * d + d * d + 2 * d * d  # time, pooled, last modulation
  stream = 4 * d * d + 8 * d * d  # query, key, value, out; MLP
  block = whole * stream + 2 * 6 * d * d + 2 * whole * whole * d
  last = image * stream + tokens * 3 * d * d + (6 + 2) * d * d + 2 * whole * whole * d
  ends = image * 2 * patch_values * d + tokens * 24 * d
  assert work.flops == 2 * batch * (vectors + ends + (config.depth - 1) * block + last)
  assert work.flops == matrix_flops(traced.jaxpr.jaxpr)
