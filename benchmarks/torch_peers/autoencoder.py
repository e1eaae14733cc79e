"""The VAE of Stable Diffusion 3 in plain PyTorch, for machines without diffusers.

Names of parameters are those of diffusers' AutoencoderKL (0.42), and the two methods answer in its form.
"""

from types import SimpleNamespace

from torch import nn
from torch.nn import functional

EPS = 1e-6


class Autoencoder(nn.Module):
  """Images [B, 3, H, W] to latents [B, C, h, w] and back."""

  @classmethod
  def from_config(cls, settings: dict) -> "Autoencoder":
    return cls(settings)

  def __init__(self, settings: dict):
    super().__init__()
    self.config = SimpleNamespace(**settings)
    self.encoder, self.decoder = Encoder(self.config), Decoder(self.config)

  def encode(self, images):
    mean, _ = self.encoder(images).chunk(2, dim=1)
    return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: mean))

  def decode(self, latents, return_dict=False):
    return (self.decoder(latents),)


def conv(inside: int, outside: int, side: int = 3, **options) -> nn.Conv2d:
  return nn.Conv2d(inside, outside, side, padding=options.pop("padding", side // 2), **options)


class Resnet(nn.Module):
  def __init__(self, inside: int, outside: int, groups: int):
    super().__init__()
    self.norm1, self.conv1 = nn.GroupNorm(groups, inside, eps=EPS), conv(inside, outside)
    self.norm2, self.conv2 = nn.GroupNorm(groups, outside, eps=EPS), conv(outside, outside)
    if inside != outside:
      self.conv_shortcut = conv(inside, outside, 1)

  def forward(self, x):
    y = self.conv1(functional.silu(self.norm1(x)))
    y = self.conv2(functional.silu(self.norm2(y)))
    return y + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
  """Attention of one head over all pixels."""

  def __init__(self, width: int, groups: int):
    super().__init__()
    self.group_norm = nn.GroupNorm(groups, width, eps=EPS)
    self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
    self.to_out = nn.ModuleList([nn.Linear(width, width)])

  def forward(self, x):
    rows = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]
    out = functional.scaled_dot_product_attention(self.to_q(rows), self.to_k(rows), self.to_v(rows))
    return x + self.to_out[0](out)[:, 0].transpose(1, 2).reshape(x.shape)


class Middle(nn.Module):
  def __init__(self, width: int, groups: int, has_attention: bool):
    super().__init__()
    self.resnets = nn.ModuleList(Resnet(width, width, groups) for _ in range(2))
    self.attentions = nn.ModuleList([Attention(width, groups)] if has_attention else [])

  def forward(self, x):
    x = self.resnets[0](x)
    for attention in self.attentions:
      x = attention(x)
    return self.resnets[1](x)


class Resample(nn.Module):
  """Halves the sides by a convolution, or doubles them by repetition and a convolution."""

  def __init__(self, width: int, *, is_up: bool):
    super().__init__()
    self.conv = conv(width, width) if is_up else conv(width, width, stride=2, padding=0)
    self.is_up = is_up

  def forward(self, x):
    x = functional.interpolate(x, scale_factor=2.0) if self.is_up else functional.pad(x, (0, 1, 0, 1))
    return self.conv(x)


class Level(nn.Module):
  def __init__(self, inside: int, outside: int, depth: int, groups: int, resample: str | None):
    super().__init__()
    self.resnets = nn.ModuleList(Resnet(inside if j == 0 else outside, outside, groups) for j in range(depth))
    self.resample = resample
    if resample:
      setattr(self, resample, nn.ModuleList([Resample(outside, is_up=resample == "upsamplers")]))

  def forward(self, x):
    for resnet in self.resnets:
      x = resnet(x)
    return getattr(self, self.resample)[0](x) if self.resample else x


def levels(channels, depth: int, groups: int, resample: str) -> nn.ModuleList:
  """Levels of these channels, all but the last followed by a change of resolution."""
  return nn.ModuleList(
    Level(channels[max(i - 1, 0)], width, depth, groups, resample if i < len(channels) - 1 else None)
    for i, width in enumerate(channels)
  )


class Encoder(nn.Module):
  def __init__(self, config):
    super().__init__()
    channels, groups = config.block_out_channels, config.norm_num_groups
    self.conv_in = conv(config.in_channels, channels[0])
    self.down_blocks = levels(channels, config.layers_per_block, groups, "downsamplers")
    self.mid_block = Middle(channels[-1], groups, config.mid_block_add_attention)
    self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=EPS)
    self.conv_out = conv(channels[-1], 2 * config.latent_channels)

  def forward(self, x):
    x = self.conv_in(x)
    for level in self.down_blocks:
      x = level(x)
    return self.conv_out(functional.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
  def __init__(self, config):
    super().__init__()
    channels, groups = config.block_out_channels[::-1], config.norm_num_groups
    self.conv_in = conv(config.latent_channels, channels[0])
    self.mid_block = Middle(channels[0], groups, config.mid_block_add_attention)
    self.up_blocks = levels(channels, config.layers_per_block + 1, groups, "upsamplers")
    self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=EPS)
    self.conv_out = conv(channels[-1], config.out_channels)

  def forward(self, x):
    x = self.mid_block(self.conv_in(x))
    for level in self.up_blocks:
      x = level(x)
    return self.conv_out(functional.silu(self.conv_norm_out(x)))
