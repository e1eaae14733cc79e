"""The MMDiT of Stable Diffusion 3 in plain PyTorch, for machines without diffusers.

Names of parameters and arguments are those of diffusers' SD3Transformer2DModel (0.42), so either can load the same
files and run in the same loop. Attention is `scaled_dot_product_attention`, and each block is a checkpoint if asked.
"""

import math
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

SINUSOID_WIDTH = 256
EPS = 1e-6


class SD3Transformer(nn.Module):
  """The velocity of SD3 and SD3.5."""

  @classmethod
  def from_config(cls, settings: dict) -> "SD3Transformer":
    return cls(settings)

  def __init__(self, settings: dict):
    super().__init__()
    self.config = config = SimpleNamespace(**settings)
    depth, duals = config.num_layers, tuple(config.dual_attention_layers or ())
    width = config.num_attention_heads * config.attention_head_dim
    self.pos_embed = PatchEmbed(config, width)
    self.time_text_embed = TimeTextEmbed(config.pooled_projection_dim, width)
    self.context_embedder = nn.Linear(config.joint_attention_dim, width)
    self.transformer_blocks = nn.ModuleList(
      JointBlock(config, width, is_dual=i in duals, is_last=i == depth - 1) for i in range(depth)
    )
    self.norm_out = Modulation(width, 2)
    self.proj_out = nn.Linear(width, config.patch_size**2 * config.in_channels)
    self.is_checkpointed = False

  def enable_gradient_checkpointing(self) -> None:
    self.is_checkpointed = True

  def forward(self, hidden_states, timestep, encoder_hidden_states, pooled_projections, return_dict=False):
    """(latents [B, C, h, w], timesteps [B], context [B, S, D'], pooled [B, P]) -> (velocity [B, C, h, w],)."""
    batch, channels, height, width = hidden_states.shape
    patch = self.config.patch_size
    rows, columns = height // patch, width // patch
    condition = functional.silu(self.time_text_embed(timestep, pooled_projections))
    image, context = self.pos_embed(hidden_states), self.context_embedder(encoder_hidden_states)
    for block in self.transformer_blocks:
      if self.is_checkpointed and torch.is_grad_enabled():
        image, context = checkpoint(block, image, context, condition, use_reentrant=False)
      else:
        image, context = block(image, context, condition)
    scale, shift = self.norm_out(condition)
    image = self.proj_out(modulate(image, shift, scale))
    image = image.reshape(batch, rows, columns, patch, patch, channels)
    return (torch.einsum("nhwpqc->nchpwq", image).reshape(batch, channels, height, width),)


def modulate(x, shift, scale):
  return functional.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


class Modulation(nn.Module):
  """`count` vectors [B, D] of the condition."""

  def __init__(self, width: int, count: int):
    super().__init__()
    self.linear, self.count = nn.Linear(width, count * width), count

  def forward(self, condition):
    return self.linear(condition).chunk(self.count, dim=-1)


class PatchEmbed(nn.Module):
  """Patches as tokens, plus the centered crop of the table of positions."""

  def __init__(self, config, width: int):
    super().__init__()
    patch, self.size = config.patch_size, config.pos_embed_max_size
    self.proj = nn.Conv2d(config.in_channels, width, patch, stride=patch)
    positions = torch.arange(self.size, dtype=torch.float64) * (config.sample_size // patch) / self.size
    angles = positions[:, None] / 10_000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    code = torch.cat([angles.sin(), angles.cos()], dim=-1).float()
    grid = (self.size, self.size, width // 2)
    table = torch.cat([code.expand(grid), code[:, None].expand(grid)], dim=-1)
    self.register_buffer("pos_embed", table.reshape(1, self.size**2, width))

  def forward(self, latents):
    x = self.proj(latents)
    rows, columns = x.shape[2:]
    top, left = (self.size - rows) // 2, (self.size - columns) // 2
    table = self.pos_embed.reshape(self.size, self.size, -1)[top : top + rows, left : left + columns]
    return (x.flatten(2).transpose(1, 2) + table.reshape(1, rows * columns, -1)).to(x.dtype)


class Two(nn.Module):
  """Two linear layers with SiLU between."""

  def __init__(self, in_width: int, width: int):
    super().__init__()
    self.linear_1, self.linear_2 = nn.Linear(in_width, width), nn.Linear(width, width)

  def forward(self, x):
    return self.linear_2(functional.silu(self.linear_1(x)))


class TimeTextEmbed(nn.Module):
  """The condition of all modulations: timestep and pooled text."""

  def __init__(self, pooled_width: int, width: int):
    super().__init__()
    self.timestep_embedder, self.text_embedder = Two(SINUSOID_WIDTH, width), Two(pooled_width, width)

  def forward(self, timestep, pooled):
    half = SINUSOID_WIDTH // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=timestep.device) / half)
    angles = timestep.float()[:, None] * frequencies
    sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1).to(pooled.dtype)
    return self.timestep_embedder(sinusoid) + self.text_embedder(pooled)


class Attention(nn.Module):
  """Attention over the image alone, or over image and context with weights of their own."""

  def __init__(self, config, width: int, *, has_context: bool, writes_context: bool):
    super().__init__()
    self.heads, head_width = config.num_attention_heads, config.attention_head_dim
    self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
    self.to_out = nn.ModuleList([nn.Linear(width, width)])
    names = ["norm_q", "norm_k"]
    if has_context:
      self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(width, width) for _ in range(3))
      names += ["norm_added_q", "norm_added_k"]
    if writes_context:
      self.to_add_out = nn.Linear(width, width)
    for name in names:
      setattr(self, name, nn.RMSNorm(head_width, eps=EPS) if config.qk_norm else nn.Identity())
    self.writes_context = writes_context

  def forward(self, image, context=None):
    def split(x):  # [B, T, N * H] -> [B, T, N, H]
      return x.unflatten(-1, (self.heads, -1))

    q, k, v = self.norm_q(split(self.to_q(image))), self.norm_k(split(self.to_k(image))), split(self.to_v(image))
    if context is not None:
      q = torch.cat([q, self.norm_added_q(split(self.add_q_proj(context)))], dim=1)
      k = torch.cat([k, self.norm_added_k(split(self.add_k_proj(context)))], dim=1)
      v = torch.cat([v, split(self.add_v_proj(context))], dim=1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    if context is None:
      return self.to_out[0](out)
    written = self.to_add_out(out[:, image.shape[1] :]) if self.writes_context else None
    return self.to_out[0](out[:, : image.shape[1]]), written


class FeedForward(nn.Module):
  """Linear, GELU, linear, with diffusers' names."""

  def __init__(self, width: int):
    super().__init__()
    first = nn.Module()
    first.proj = nn.Linear(width, 4 * width)
    self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(4 * width, width)])

  def forward(self, x):
    return self.net[2](functional.gelu(self.net[0].proj(x), approximate="tanh"))


class JointBlock(nn.Module):
  """One block; `is_dual` adds attention over the image alone, `is_last` only reads the context."""

  def __init__(self, config, width: int, *, is_dual: bool, is_last: bool):
    super().__init__()
    self.norm1, self.norm1_context = Modulation(width, 9 if is_dual else 6), Modulation(width, 2 if is_last else 6)
    self.attn = Attention(config, width, has_context=True, writes_context=not is_last)
    self.ff = FeedForward(width)
    if is_dual:
      self.attn2 = Attention(config, width, has_context=False, writes_context=False)
    if not is_last:
      self.ff_context = FeedForward(width)
    self.is_dual, self.is_last = is_dual, is_last

  def forward(self, image, context, condition):
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, *dual = self.norm1(condition)
    if self.is_last:
      context_scale, context_shift = self.norm1_context(condition)
    else:
      context_shift, context_scale, *of_context = self.norm1_context(condition)
    attended, written = self.attn(modulate(image, shift, scale), modulate(context, context_shift, context_scale))
    result = image + gate[:, None] * attended
    if self.is_dual:
      result = result + dual[2][:, None] * self.attn2(modulate(image, *dual[:2]))
    image = result + mlp_gate[:, None] * self.ff(modulate(result, mlp_shift, mlp_scale))
    if not self.is_last:
      context_gate, mlp_shift, mlp_scale, mlp_gate = of_context
      context = context + context_gate[:, None] * written
      context = context + mlp_gate[:, None] * self.ff_context(modulate(context, mlp_shift, mlp_scale))
    return image, context
