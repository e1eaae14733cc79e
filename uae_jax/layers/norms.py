"""Normalization layers, computed in float32 and returned in the input's dtype."""

from flax import nnx
import jax
import jax.numpy as jnp


class RMSNorm(nnx.Module):
  """x / rms(x) * scale over the last axis. Source: transformers 5.23 Qwen2RMSNorm, diffusers 0.42 RMSNorm."""

  def __init__(self, width: int, *, eps: float = 1e-6):
    self.scale = nnx.Param(jnp.ones((width,), jnp.float32), out_sharding=(None,))
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
    return (y * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
  """(x - mean) / std * scale + bias over the last axis; no parameters if `affine` is False.

  Source: torch.nn.LayerNorm.
  """

  def __init__(self, width: int, *, eps: float = 1e-5, affine: bool = True):
    if affine:
      self.scale = nnx.Param(jnp.ones((width,), jnp.float32), out_sharding=(None,))
      self.bias = nnx.Param(jnp.zeros((width,), jnp.float32), out_sharding=(None,))
    self.affine = affine
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
    if self.affine:
      y = y * self.scale[...] + self.bias[...]
    return y.astype(x.dtype)
