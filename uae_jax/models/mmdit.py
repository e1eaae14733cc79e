"""MMDiT: the two-stream transformer of Stable Diffusion 3 and 3.5, which predicts the velocity of a rectified flow.

Source: Esser et al. 2024 (arXiv 2403.03206); diffusers 0.42 transformer_sd3.py (SD3Transformer2DModel) and attention.py
(JointTransformerBlock). Image tokens and context tokens have separate weights and share one attention. Letters: see
layers/__init__.py; here S is the number of context tokens and C of latent channels, and a modulation is a triple
(shift, scale, gate) of vectors [B, D] computed from the timestep and the pooled text.

Differences from diffusers: normalization and modulation are one float32 expression (diffusers rounds in between when it
runs in bfloat16), and padding of the context can be masked.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import einops
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from uae_jax.layers.attention import attend
from uae_jax.layers.buffer import Buffer
from uae_jax.layers.lora import Linear
from uae_jax.layers.norms import LayerNorm, RMSNorm
from uae_jax.layers.stack import scan_layers, stack
from uae_jax.sharding import constrain, gather

SINUSOID_WIDTH = 256
NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
  """Architecture of an MMDiT.

  Attributes:
    depth: number of joint blocks; the last one reads the context but does not update it.
    num_heads: N.
    head_width: H; the width is N * H.
    patch: side of a patch, in latent pixels.
    in_channels: C, channels of the latents and of the velocity.
    context_width: width of the context tokens, the output of the connector.
    pooled_width: width of the pooled text vector.
    pos_embed_max_size: side of the stored position grid, in patches.
    sample_size: side, in latent pixels, of the square that the positions of the whole sin-cos table are scaled to.
    dual_attention_layers: indices of blocks with a second, image-only attention; they must be the first blocks.
    qk_norm: RMS-normalize queries and keys per head.
    remat: a key of `layers.stack.REMAT_POLICIES`.
    unroll: unroll the layers instead of scanning them.
  """

  depth: int
  num_heads: int
  head_width: int
  patch: int
  context_width: int
  pooled_width: int
  pos_embed_max_size: int
  in_channels: int = 16
  sample_size: int = 128
  dual_attention_layers: tuple[int, ...] = ()
  qk_norm: bool = True
  remat: str = "none"
  unroll: bool = False

  def __post_init__(self):
    if self.dual_attention_layers != tuple(range(len(self.dual_attention_layers))):
      raise ValueError(f"dual_attention_layers must be the first blocks, found {self.dual_attention_layers}")
    if len(self.dual_attention_layers) > self.depth:
      raise ValueError(f"{len(self.dual_attention_layers)} dual_attention_layers in {self.depth} layers (depth)")
    if self.width % 4:
      raise ValueError(f"width {self.width} (num_heads * head_width) must be a multiple of 4 for the position table")

  @property
  def width(self) -> int:
    return self.num_heads * self.head_width

  @property
  def num_dual(self) -> int:
    """Number of blocks before the last that have the second attention."""
    return min(len(self.dual_attention_layers), self.depth - 1)

  @property
  def last_is_dual(self) -> bool:
    return self.depth - 1 in self.dual_attention_layers

  @classmethod
  def sd35_large(cls) -> "MMDiTConfig":
    """Source: stabilityai/stable-diffusion-3.5-large, transformer/config.json."""
    return cls(
      depth=38, num_heads=38, head_width=64, patch=2, context_width=4096, pooled_width=2048, pos_embed_max_size=192
    )

  @classmethod
  def sd35_medium(cls) -> "MMDiTConfig":
    """Source: stabilityai/stable-diffusion-3.5-medium, transformer/config.json."""
    return dataclasses.replace(
      cls.sd35_large(), depth=24, num_heads=24, pos_embed_max_size=384, dual_attention_layers=tuple(range(13))
    )

  @classmethod
  def from_huggingface(cls, config: Mapping[str, Any]) -> "MMDiTConfig":
    """Reads the `config.json` of a diffusers SD3Transformer2DModel.

    Raises:
      ValueError: the file describes an unsupported architecture.
    """
    width = config["num_attention_heads"] * config["attention_head_dim"]
    if config["caption_projection_dim"] != width:
      raise ValueError(f"caption_projection_dim {config['caption_projection_dim']} is not the width {width}")
    if config.get("out_channels", config["in_channels"]) not in (None, config["in_channels"]):
      raise ValueError(f"out_channels {config['out_channels']} is not in_channels {config['in_channels']}")
    if config.get("qk_norm") not in (None, "rms_norm"):
      raise ValueError(f"qk_norm {config['qk_norm']!r} is not known; expected None or 'rms_norm'")
    duals = config.get("dual_attention_layers") or ()
    if sorted(set(duals)) != list(duals) or any(type(i) is not int or not 0 <= i < config["num_layers"] for i in duals):
      raise ValueError(f"dual_attention_layers {duals} are no ascending numbers of layers")
    return cls(
      depth=config["num_layers"],
      num_heads=config["num_attention_heads"],
      head_width=config["attention_head_dim"],
      patch=config["patch_size"],
      in_channels=config["in_channels"],
      context_width=config["joint_attention_dim"],
      pooled_width=config["pooled_projection_dim"],
      pos_embed_max_size=config["pos_embed_max_size"],
      sample_size=config["sample_size"],
      dual_attention_layers=tuple(duals),
      qk_norm=config.get("qk_norm") is not None,
    )


def inputs_spec(config: MMDiTConfig, batch: int, height: int, width: int, tokens: int, dtype=jnp.float32) -> dict:
  """Shapes of the inputs of `MMDiT.__call__`, by name; height and width in latent pixels."""
  return {
    "latents": jax.ShapeDtypeStruct((batch, height, width, config.in_channels), dtype),
    "timesteps": jax.ShapeDtypeStruct((batch,), jnp.float32),
    "context": jax.ShapeDtypeStruct((batch, tokens, config.context_width), dtype),
    "pooled": jax.ShapeDtypeStruct((batch, config.pooled_width), dtype),
  }


def sinusoid(timesteps: jax.Array) -> jax.Array:
  """[cos | sin] of the timestep at 128 frequencies from 1 to 1/10000, in float32: float[B] -> float32[B, 256].

  Source: diffusers 0.42 embeddings.py, `Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)`.
  """
  half = SINUSOID_WIDTH // 2
  frequencies = np.exp(-math.log(10_000) * np.arange(half) / half).astype(np.float32)
  angles = timesteps.astype(jnp.float32)[:, None] * frequencies
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def position_table(config: MMDiTConfig) -> jax.Array:
  """The position table float32[max, max, D]: sin-cos codes, the column in the first half of D, the row in the second.

  Source: diffusers 0.42 embeddings.py, get_2d_sincos_pos_embed with `base_size = sample_size // patch`.
  """
  size, quarter = config.pos_embed_max_size, config.width // 4
  positions = np.arange(size) * (config.sample_size // config.patch) / size
  angles = positions[:, None] / 10_000 ** (np.arange(quarter) / quarter)
  # Only the one-dimensional code is a constant of the program; XLA computes the grid (0.9 GB for the medium model).
  code = jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=-1), jnp.float32)
  shape = (size, size, 2 * quarter)
  return jnp.concatenate([jnp.broadcast_to(code, shape), jnp.broadcast_to(code[:, None], shape)], axis=-1)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
  """LayerNorm(x) * (1 + scale) + shift in float32, for x float[B, T, D], shift and scale float[B, D]."""
  y = LayerNorm(x.shape[-1], eps=NORM_EPS, affine=False)(x.astype(jnp.float32))
  y = y * (1 + scale.astype(jnp.float32)[:, None]) + shift.astype(jnp.float32)[:, None]
  return y.astype(x.dtype)


class Projections(nnx.Module):
  """Queries, keys and values of one stream: float[B, T, D] -> three float[B, T, N, H]."""

  def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
    self.query = Linear(config.width, config.width, axes=("embed", "heads"), rngs=rngs)
    self.key = Linear(config.width, config.width, axes=("embed", "heads"), rngs=rngs)
    self.value = Linear(config.width, config.width, axes=("embed", "heads"), rngs=rngs)
    if config.qk_norm:
      self.query_norm = RMSNorm(config.head_width, eps=NORM_EPS)
      self.key_norm = RMSNorm(config.head_width, eps=NORM_EPS)
    self.config = config

  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    heads = (*x.shape[:-1], self.config.num_heads, self.config.head_width)
    q, k, v = self.query(x).reshape(heads), self.key(x).reshape(heads), self.value(x).reshape(heads)
    if self.config.qk_norm:
      q, k = self.query_norm(q), self.key_norm(k)
    return q, k, v


class Stream(nnx.Module):
  """The weights of one stream in a joint block.

  Args:
    modulations: number of (shift, scale, gate) triples; 0, for a context that is read but not updated, stores only
      (scale, shift).
  """

  def __init__(self, config: MMDiTConfig, *, modulations: int, rngs: nnx.Rngs):
    width = config.width
    self.modulation = Linear(
      width,
      (3 * modulations or 2) * width,
      axes=("embed", "mlp"),
      kernel_init=nnx.initializers.zeros,
      rngs=rngs,
    )
    self.projections = Projections(config, rngs=rngs)
    if modulations:
      self.out = Linear(width, width, axes=("heads", "embed"), rngs=rngs)
      self.mlp_in = Linear(width, 4 * width, axes=("embed", "mlp"), rngs=rngs)
      self.mlp_out = Linear(4 * width, width, axes=("mlp", "embed"), rngs=rngs)

  def mlp(self, x: jax.Array) -> jax.Array:
    hidden = jax.nn.gelu(self.mlp_in(x), approximate=True)
    return self.mlp_out(constrain(hidden, "batch", "act_tokens", "act_mlp"))

  def finish(self, x: jax.Array, attended: jax.Array, modulation: list[jax.Array], extra: jax.Array | None = None):
    """Adds the attention output (and `extra`, already gated), then the MLP output, to the residual stream x."""
    _, _, gate, mlp_shift, mlp_scale, mlp_gate, *_ = modulation
    x = x + gate[:, None] * self.out(attended)
    if extra is not None:
      x = x + extra
    x = x + mlp_gate[:, None] * self.mlp(modulate(x, mlp_shift, mlp_scale))
    return constrain(x, "batch", "act_tokens", "act_embed")


class JointBlock(nnx.Module):
  """One joint block; `is_dual` adds the image-only attention, `is_last` leaves the context unchanged.

  (image float[B, T, D], context float[B, S, D], condition float[B, D] after SiLU) -> (image, context).
  """

  def __init__(self, config: MMDiTConfig, *, is_dual: bool, is_last: bool, rngs: nnx.Rngs):
    self.image = Stream(config, modulations=3 if is_dual else 2, rngs=rngs)
    self.context = Stream(config, modulations=0 if is_last else 2, rngs=rngs)
    if is_dual:
      self.dual_projections = Projections(config, rngs=rngs)
      self.dual_out = Linear(config.width, config.width, axes=("heads", "embed"), rngs=rngs)
    self.is_dual = is_dual
    self.is_last = is_last

  def __call__(self, image: jax.Array, context: jax.Array, condition: jax.Array, mask: jax.Array | None):
    image_modulation = jnp.split(self.image.modulation(condition), 9 if self.is_dual else 6, axis=-1)
    context_modulation = jnp.split(self.context.modulation(condition), 2 if self.is_last else 6, axis=-1)
    # A context that is only read is modulated by a layer that stores (scale, shift), not (shift, scale).
    shift, scale = context_modulation[1::-1] if self.is_last else context_modulation[:2]

    image_heads = self.image.projections(modulate(image, *image_modulation[:2]))
    context_heads = self.context.projections(modulate(context, shift, scale))
    q, k, v = (
      constrain(jnp.concatenate(pair, axis=1), "batch", "act_tokens", "act_heads", None)
      for pair in zip(image_heads, context_heads, strict=True)
    )
    attended = attend(q, k, v, mask=mask)
    attended = attended.reshape(*attended.shape[:2], -1)
    image_attended, context_attended = jnp.split(attended, [image.shape[1]], axis=1)

    extra = None
    if self.is_dual:
      dual_shift, dual_scale, dual_gate = image_modulation[6:]
      dual = attend(*self.dual_projections(modulate(image, dual_shift, dual_scale)))
      extra = dual_gate[:, None] * self.dual_out(dual.reshape(image.shape))

    image = self.image.finish(image, image_attended, image_modulation, extra)
    if not self.is_last:
      context = self.context.finish(context, context_attended, context_modulation)
    return image, context


class MMDiT(nnx.Module):
  """The complete MMDiT; at initialization it outputs exactly zero (adaLN-zero and a zero output layer)."""

  def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
    width, patch_values = config.width, config.patch**2 * config.in_channels
    zeros = nnx.initializers.zeros
    self.patch_embed = Linear(patch_values, width, axes=("patch", "embed"), rngs=rngs)
    self.position_table = Buffer(position_table(config), out_sharding=(None, None, "embed"))
    self.time_in = Linear(SINUSOID_WIDTH, width, axes=(None, "mlp"), rngs=rngs)
    self.time_out = Linear(width, width, axes=("mlp", "embed"), rngs=rngs)
    self.pooled_in = Linear(config.pooled_width, width, axes=("embed", "mlp"), rngs=rngs)
    self.pooled_out = Linear(width, width, axes=("mlp", "embed"), rngs=rngs)
    self.context_embed = Linear(config.context_width, width, axes=("mlp", "embed"), rngs=rngs)
    num_plain = config.depth - 1 - config.num_dual
    if config.num_dual:
      self.dual_layers = stack(lambda r: JointBlock(config, is_dual=True, is_last=False, rngs=r), config.num_dual, rngs)
    if num_plain:
      self.layers = stack(lambda r: JointBlock(config, is_dual=False, is_last=False, rngs=r), num_plain, rngs)
    self.last = JointBlock(config, is_dual=config.last_is_dual, is_last=True, rngs=rngs)
    self.out_modulation = Linear(width, 2 * width, axes=("embed", "mlp"), kernel_init=zeros, rngs=rngs)
    self.out = Linear(width, patch_values, axes=("embed", "patch"), kernel_init=zeros, rngs=rngs)
    self.stacks = (("dual_layers",) if config.num_dual else ()) + (("layers",) if num_plain else ())
    self.config = config

  def __call__(
    self,
    latents: jax.Array,
    timesteps: jax.Array,
    context: jax.Array,
    pooled: jax.Array,
    context_mask: jax.Array | None = None,
  ) -> jax.Array:
    """The velocity d latents / d sigma. Computes in the dtype of `latents`.

    Args:
      latents: float[B, h, w, C]; h and w are multiples of the patch.
      timesteps: float[B], 1000 * sigma, in [0, 1000]; the sinusoid is computed in float32.
      context: float[B, S, context_width].
      pooled: float[B, pooled_width].
      context_mask: bool[B, S], False at padding; None attends to all tokens, as the official model does.

    Returns:
      float[B, h, w, C].

    Raises:
      ValueError: a side of the latents does not divide into patches, or has more patches than the position table.
    """
    config, dtype = self.config, latents.dtype
    height, width = latents.shape[1] // config.patch, latents.shape[2] // config.patch
    if latents.shape[1] % config.patch or latents.shape[2] % config.patch:
      raise ValueError(f"latents of {latents.shape[1:3]} pixels do not divide into patches of {config.patch}")
    if max(height, width) > config.pos_embed_max_size:
      raise ValueError(f"{height} x {width} patches exceed pos_embed_max_size {config.pos_embed_max_size}")

    image = einops.rearrange(latents, "b (h p) (w q) c -> b (h w) (p q c)", p=config.patch, q=config.patch)
    image = (self.patch_embed(image).astype(jnp.float32) + self.positions(height, width)).astype(dtype)
    image = constrain(image, "batch", "act_tokens", "act_embed")
    context = constrain(self.context_embed(context.astype(dtype)), "batch", "act_tokens", "act_embed")
    condition = jax.nn.silu(self.condition(timesteps, pooled.astype(dtype)))
    mask = None
    if context_mask is not None:
      image_mask = jnp.ones(image.shape[:2], bool)
      mask = jnp.concatenate([image_mask, context_mask], axis=1)[:, None, None]

    def body(streams, block, _):
      return block(*streams, condition, mask), None

    for name in self.stacks:
      (image, context), _ = scan_layers(
        body, (image, context), getattr(self, name), remat=config.remat, unroll=config.unroll or 1
      )
    image, _ = self.last(image, context, condition, mask)
    scale, shift = jnp.split(self.out_modulation(condition), 2, axis=-1)
    patches = self.out(modulate(image, shift, scale))
    return einops.rearrange(
      patches, "b (h w) (p q c) -> b (h p) (w q) c", h=height, w=width, p=config.patch, q=config.patch
    )

  def condition(self, timesteps: jax.Array, pooled: jax.Array) -> jax.Array:
    """The vector that all modulations are computed from: float[B], float[B, P] -> float[B, D]."""
    time = self.time_out(jax.nn.silu(self.time_in(sinusoid(timesteps).astype(pooled.dtype))))
    return time + self.pooled_out(jax.nn.silu(self.pooled_in(pooled)))

  def positions(self, height: int, width: int) -> jax.Array:
    """The central height x width patches of the position table: float32[height * width, D]."""
    size = self.config.pos_embed_max_size
    top, left = (size - height) // 2, (size - width) // 2
    table = gather(self.position_table[...][top : top + height, left : left + width], None, None, "embed")
    return table.astype(jnp.float32).reshape(height * width, -1)
