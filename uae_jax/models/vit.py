"""The pre-norm transformer trunk that the image embedders share, and the tower of patches of the SigLIP models.

A block is x + scale * attention(norm(x)), then x + scale * mlp(norm(x)). Letters: see layers/__init__.py.
"""

from collections.abc import Callable
import dataclasses

import einops
from flax import nnx
import jax
import jax.numpy as jnp

from uae_jax.layers.attention import attend
from uae_jax.layers.lora import Linear
from uae_jax.layers.norms import LayerNorm
from uae_jax.layers.resize import resize
from uae_jax.layers.stack import scan_layers, stack
from uae_jax.sharding import constrain, gather


def quick_gelu(x: jax.Array) -> jax.Array:
  """x * sigmoid(1.702 x), the activation of OpenAI's CLIP."""
  return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
  "quick_gelu": quick_gelu,
  "silu": jax.nn.silu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
  """Architecture of the blocks; models add the layers before and after them.

  Attributes:
    width: D.
    depth: number of blocks.
    num_heads: N.
    mlp_width: F.
    activation: a key of `ACTIVATIONS`.
    norm_eps: epsilon of every LayerNorm.
    layer_scale: initial value of the per-channel gains after attention and MLP; None for no gains.
    query_bias, key_bias, value_bias, out_bias, mlp_bias: whether the linear layer has a bias.
    gated_mlp: down(activation(gate(x)) * up(x)) instead of down(activation(up(x))).
    is_causal: a token attends only to itself and to earlier tokens.
    remat: a key of `layers.stack.REMAT_POLICIES`.
    unroll: unroll the layers instead of scanning them.
  """

  width: int
  depth: int
  num_heads: int
  mlp_width: int
  activation: str = "gelu"
  norm_eps: float = 1e-5
  layer_scale: float | None = None
  query_bias: bool = True
  key_bias: bool = True
  value_bias: bool = True
  out_bias: bool = True
  mlp_bias: bool = True
  gated_mlp: bool = False
  is_causal: bool = False
  remat: str = "none"
  unroll: bool = False

  def __post_init__(self):
    if self.width % self.num_heads:
      raise ValueError(f"width {self.width} does not divide into {self.num_heads} heads (num_heads)")
    if self.activation not in ACTIVATIONS:
      raise ValueError(f"activation {self.activation!r} is not known; expected one of {sorted(ACTIVATIONS)}")

  @property
  def head_width(self) -> int:
    return self.width // self.num_heads


class Projections(nnx.Module):
  """The linear layers of an attention; subclasses call them."""

  def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
    width = config.width
    self.query = Linear(width, width, axes=("embed", "heads"), use_bias=config.query_bias, rngs=rngs)
    self.key = Linear(width, width, axes=("embed", "heads"), use_bias=config.key_bias, rngs=rngs)
    self.value = Linear(width, width, axes=("embed", "heads"), use_bias=config.value_bias, rngs=rngs)
    self.out = Linear(width, width, axes=("heads", "embed"), use_bias=config.out_bias, rngs=rngs)
    self.config = config


class Attention(Projections):
  """Self-attention, float[B, T, D] -> float[B, T, D]; `rotate` applies RoPE to queries and keys float[B, T, N, H]."""

  def __call__(self, x: jax.Array, rotate: Callable[[jax.Array], jax.Array] | None) -> jax.Array:
    heads = (*x.shape[:-1], self.config.num_heads, self.config.head_width)
    q, k, v = (
      constrain(layer(x).reshape(heads), "batch", "act_tokens", "act_heads", None)
      for layer in (self.query, self.key, self.value)
    )
    if rotate is not None:
      q, k = rotate(q), rotate(k)
    return self.out(attend(q, k, v, is_causal=self.config.is_causal).reshape(x.shape))


class MLP(nnx.Module):
  """The MLP of a block, gated or plain: float[B, T, D] -> float[B, T, D]."""

  def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
    width, mlp_width, use_bias = config.width, config.mlp_width, config.mlp_bias
    if config.gated_mlp:
      self.gate = Linear(width, mlp_width, axes=("embed", "mlp"), use_bias=use_bias, rngs=rngs)
    self.up = Linear(width, mlp_width, axes=("embed", "mlp"), use_bias=use_bias, rngs=rngs)
    self.down = Linear(mlp_width, width, axes=("mlp", "embed"), use_bias=use_bias, rngs=rngs)
    self.config = config

  def __call__(self, x: jax.Array) -> jax.Array:
    activation = ACTIVATIONS[self.config.activation]
    hidden = activation(self.gate(x)) * self.up(x) if self.config.gated_mlp else activation(self.up(x))
    return self.down(constrain(hidden, "batch", "act_tokens", "act_mlp"))


class Block(nnx.Module):
  """One transformer block: float[B, T, D] -> float[B, T, D]."""

  def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
    self.attention_norm = LayerNorm(config.width, eps=config.norm_eps)
    self.attention = Attention(config, rngs=rngs)
    self.mlp_norm = LayerNorm(config.width, eps=config.norm_eps)
    self.mlp = MLP(config, rngs=rngs)
    if config.layer_scale is not None:
      gains = jnp.full((config.width,), config.layer_scale, jnp.float32)
      self.attention_scale = nnx.Param(gains, out_sharding=(None,))
      self.mlp_scale = nnx.Param(gains, out_sharding=(None,))
    self.has_scale = config.layer_scale is not None

  def __call__(self, x: jax.Array, rotate: Callable[[jax.Array], jax.Array] | None) -> jax.Array:
    attended = self.attention(self.attention_norm(x), rotate)
    x = x + (attended * self.attention_scale[...].astype(x.dtype) if self.has_scale else attended)
    hidden = self.mlp(self.mlp_norm(x))
    x = x + (hidden * self.mlp_scale[...].astype(x.dtype) if self.has_scale else hidden)
    return constrain(x, "batch", "act_tokens", "act_embed")


class Encoder(nnx.Module):
  """All blocks, run by a scan; no norm before or after."""

  def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
    self.layers = stack(lambda r: Block(config, rngs=r), config.depth, rngs)
    self.config = config

  def __call__(self, x: jax.Array, rotate: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
    def body(x, block, _):
      return block(x, rotate), None

    x, _ = scan_layers(body, x, self.layers, remat=self.config.remat, unroll=self.config.unroll or 1)
    return x


@dataclasses.dataclass(frozen=True, kw_only=True)
class PatchTowerConfig(ViTConfig):
  """Architecture of a `PatchTower`.

  Attributes:
    image_px: side, in pixels, of the square image that the stored position table is for.
    patch: side of a patch, in pixels.
  """

  image_px: int
  patch: int
  norm_eps: float = 1e-6

  @property
  def grid(self) -> int:
    """Side of the stored position table, in patches."""
    return self.image_px // self.patch


class PatchTower(nnx.Module):
  """A SigLIP's image tower without pooling: patches and learned positions, the blocks, a norm.

  Source: Zhai et al. 2023 (arXiv 2303.15343); transformers 5.23 modeling_siglip.py.
  """

  def __init__(self, config: PatchTowerConfig, *, rngs: nnx.Rngs):
    width = config.width
    self.patch_embed = Linear(config.patch**2 * 3, width, axes=("patch", "embed"), rngs=rngs)
    positions = nnx.initializers.normal(width**-0.5)(rngs.params(), (config.grid**2, width))
    self.positions = nnx.Param(positions, out_sharding=(None, "embed"))
    self.encoder = Encoder(config, rngs=rngs)
    self.norm_out = LayerNorm(width, eps=config.norm_eps)
    self.config = config

  def patch_states(self, pixels: jax.Array) -> jax.Array:
    """States of the patches in raster order, in the dtype of `pixels`.

    Args:
      pixels: float[B, H, W, 3] in [-1, 1]; H and W at least one patch.

    Returns:
      float[B, T, D].
    """
    patch = self.config.patch
    x = self.patch_embed(patches(pixels, patch))
    x = x + self.position_table(pixels.shape[1] // patch, pixels.shape[2] // patch).astype(x.dtype)
    return self.norm_out(self.encoder(constrain(x, "batch", "act_tokens", "act_embed")))

  def position_table(self, height: int, width: int) -> jax.Array:
    """The position table, resized if necessary to a grid of height x width patches: float[height * width, D].

    Source: modeling_siglip.py, `interpolate_pos_encoding`.
    """
    positions, grid = gather(self.positions[...], None, "embed"), self.config.grid
    if (height, width) == (grid, grid):
      return positions
    table = resize(positions.astype(jnp.float32).reshape(1, grid, grid, -1), height, width)
    return table.reshape(height * width, -1)


def patches(pixels: jax.Array, size: int) -> jax.Array:
  """Non-overlapping patches in raster order: float[B, H, W, C] -> float[B, (H / size)(W / size), size * size * C].

  A remainder at the right or the bottom is dropped, as in a strided convolution.
  """
  height, width = pixels.shape[1] // size * size, pixels.shape[2] // size * size
  pixels = pixels[:, :height, :width]
  return einops.rearrange(pixels, "b (h p) (w q) c -> b (h w) (p q c)", p=size, q=size)


def prepend(token: jax.Array, x: jax.Array) -> jax.Array:
  """Prepends float[D] or float[K, D] to the tokens of every row: float[B, T, D] -> float[B, K + T, D]."""
  tokens = token.astype(x.dtype).reshape(-1, x.shape[-1])
  return jnp.concatenate([jnp.broadcast_to(tokens, (x.shape[0], *tokens.shape)), x], axis=1)
