"""The custom gradients of convolutions equal autodiff: every stride and padding, in a loop, lowered for TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax.layers.conv import conv

SAME = ((1, 1), (1, 1))
CASES = [
  # height, width, kernel, stride, padding
  (8, 6, (3, 3), 1, SAME),
  (8, 6, (3, 3), 2, ((0, 1), (0, 1))),  # the VAE's downsampling: no remainder
  (8, 7, (3, 3), 2, SAME),  # a remainder of one row, of no column
  (7, 9, (3, 2), 3, ((2, 0), (0, 1))),
  (6, 5, (1, 1), 1, ((0, 0), (0, 0))),
  (9, 9, (2, 2), 4, ((0, 0), (0, 0))),  # a remainder larger than the padding
]


def plain(x, kernel, stride, padding):
  return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def draw(height, width, window):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(3, height, width, 4)).astype(np.float32)
  return x, rng.normal(size=(*window, 4, 5)).astype(np.float32)


@pytest.mark.parametrize("height, width, window, stride, padding", CASES)
def test_gradients(height, width, window, stride, padding):
  x, kernel = draw(height, width, window)
  out, pullback = jax.vjp(lambda x, kernel: conv(x, kernel, stride, padding), x, kernel)
  want, plain_pullback = jax.vjp(lambda x, kernel: plain(x, kernel, stride, padding), x, kernel)
  np.testing.assert_array_equal(out, want)
  gradient = np.random.default_rng(1).normal(size=out.shape).astype(np.float32)
  for found, expected in zip(pullback(gradient), plain_pullback(gradient), strict=True):
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_in_a_scan_and_under_remat():
  x, kernel = draw(8, 6, (3, 3))
  xs = jnp.stack([x, 2 * x])

  def total(kernel, body):
    return jax.lax.scan(lambda sum_, x: (sum_ + jnp.sum(body(x, kernel, 1, SAME) ** 2), None), 0.0, xs)[0]

  want = jax.jit(jax.grad(lambda kernel: total(kernel, plain)))(kernel)
  rematerialized = jax.checkpoint(conv, static_argnums=(2, 3), policy=jax.checkpoint_policies.nothing_saveable)
  for body in (conv, rematerialized):
    found = jax.jit(jax.grad(lambda kernel, body=body: total(kernel, body)))(kernel)
    np.testing.assert_allclose(found, want, rtol=1e-4)


def test_lowered_for_tpu_it_is_autodiffs():
  """Ahead-of-time programs for a TPU do not use the CPU variant, although they are traced on a CPU host."""
  x, kernel = draw(8, 6, (3, 3))

  def gradients(body):
    grad = jax.grad(lambda x, kernel: jnp.sum(body(x, kernel, 2, ((0, 1), (0, 1))) ** 2), argnums=(0, 1))
    text = jax.jit(grad).trace(x, kernel).lower(lowering_platforms=("tpu",)).as_text()
    return sorted(line.split("window = ")[1] for line in text.splitlines() if "stablehlo.convolution" in line)

  assert gradients(conv) == gradients(plain)
  assert len(gradients(conv)) == 3
