"""Two-dimensional convolution on NHWC images, and group normalization.

The forward convolution is XLA's on every platform. On CPU the gradients are written as plain convolutions as well: the
ones that autodiff produces (reversed window, contraction over the batch) are fast only outside loops; inside `lax.scan`
they were up to 140 times slower. im2col and shifted matrix products are slower than plain convolutions.
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp

Padding = tuple[tuple[int, int], tuple[int, int]]  # zeros ((top, bottom), (left, right))


def correlate(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
  return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: Padding = ((0, 0), (0, 0))) -> jax.Array:
  """Cross-correlation of float[B, H, W, C] with [kh, kw, C, O]; both have the same dtype."""
  return correlate(x, kernel, stride, padding)


def forward(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding):
  return correlate(x, kernel, stride, padding), (x, kernel)


def backward(stride: int, padding: Padding, inputs: tuple[jax.Array, jax.Array], gradient: jax.Array):
  def by_autodiff(x, kernel, gradient):
    return jax.vjp(lambda x, kernel: correlate(x, kernel, stride, padding), x, kernel)[1](gradient)

  def by_convolution(x, kernel, gradient):
    # A stride puts zeros between the gradient's pixels; `left_over` counts rows or columns that no window reached.
    spread = jax.lax.pad(gradient, jnp.zeros((), gradient.dtype), ((0, 0, 0), *((0, 0, stride - 1),) * 2, (0, 0, 0)))

    def paddings(axis: int) -> tuple[tuple[int, int], tuple[int, int]]:
      """Padding along one axis for the gradient of x and for that of the kernel."""
      before, after = padding[axis]
      size = kernel.shape[axis]
      left_over = x.shape[axis + 1] + before + after - size - spread.shape[axis + 1] + 1
      return (size - 1 - before, size - 1 - after + left_over), (before, after - left_over)

    (full_rows, valid_rows), (full_columns, valid_columns) = paddings(0), paddings(1)
    grad_x = correlate(spread, jnp.flip(kernel, (0, 1)).swapaxes(2, 3), 1, (full_rows, full_columns))
    # Channels as batch, the batch as channels: [C, H, W, B] with [h, w, B, O] -> [C, kh, kw, O].
    images, kernels = jnp.transpose(x, (3, 1, 2, 0)), jnp.transpose(spread, (1, 2, 0, 3))
    grad_kernel = correlate(images, kernels, 1, (valid_rows, valid_columns))
    return grad_x, jnp.transpose(grad_kernel, (1, 2, 0, 3))

  return jax.lax.platform_dependent(*inputs, gradient, cpu=by_convolution, default=by_autodiff)


conv.defvjp(forward, backward)


class Conv(nnx.Module):
  """conv(x) + bias in the dtype of x; the default padding keeps the image size at stride 1 for odd `size`."""

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    *,
    size: int = 3,
    stride: int = 1,
    padding: Padding | None = None,
    rngs: nnx.Rngs,
  ):
    shape = (size, size, in_channels, out_channels)
    init = nnx.initializers.lecun_normal()
    self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32), out_sharding=(None, None, "conv_in", "conv_out"))
    self.bias = nnx.Param(jnp.zeros((out_channels,), jnp.float32), out_sharding=(None,))
    self.stride = stride
    self.padding = ((size // 2, size // 2),) * 2 if padding is None else padding

  def __call__(self, x: jax.Array) -> jax.Array:
    y = conv(x, self.kernel[...].astype(x.dtype), self.stride, self.padding)
    return y + self.bias[...].astype(x.dtype)


class GroupNorm(nnx.Module):
  """Normalizes each group of channels over its channels and all pixels, in float32. Source: torch.nn.GroupNorm."""

  def __init__(self, channels: int, groups: int, *, eps: float = 1e-6):
    if channels % groups:
      raise ValueError(f"{channels} channels do not divide into {groups} groups (norm_groups)")
    self.scale = nnx.Param(jnp.ones((channels,), jnp.float32), out_sharding=(None,))
    self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32), out_sharding=(None,))
    self.groups = groups
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32).reshape(x.shape[0], -1, x.shape[-1])
    y = y - self.group_mean(y)
    y = y * (jax.lax.rsqrt(self.group_mean(jnp.square(y)) + self.eps) * self.scale[...]) + self.bias[...]
    return y.reshape(x.shape).astype(x.dtype)

  def group_mean(self, x: jax.Array) -> jax.Array:
    """The mean of each channel's group: float32[B, P, C] -> float32[B, 1, C].

    Pixels are reduced first: arrays whose last axis is the width of one group (often 2 or 4) are slow everywhere.
    """
    batch, _, channels = x.shape
    means = jnp.mean(x, axis=1).reshape(batch, self.groups, -1).mean(axis=-1)
    return jnp.repeat(means, channels // self.groups, axis=1)[:, None]
