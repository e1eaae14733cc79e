"""Reconstructions to rewards to advantages: VAE, bicubic resize, CLIP, cosine, group normalization."""

import torch

from benchmarks.torch_peers.nets import Nets

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def decode(nets: Nets, latents: torch.Tensor) -> torch.Tensor:
  """Decodes latents to images float[B, 3, H, W] in [-1, 1]."""
  config, chunks = nets.vae.config, nets.size.decode_chunks
  scaled = latents.to(nets.dtype) / config.scaling_factor + config.shift_factor
  images = [nets.vae.decode(chunk, return_dict=False)[0] for chunk in scaled.chunk(chunks)]
  return torch.cat(images).clamp(-1, 1)


def embed(nets: Nets, images: torch.Tensor) -> torch.Tensor:
  """Unit-norm embeddings float32[B, E] of images [B, 3, H, W] in [-1, 1]."""
  side = nets.clip.config.image_size
  pixels = torch.nn.functional.interpolate(0.5 * images.float() + 0.5, (side, side), mode="bicubic")
  mean, std = (torch.tensor(values, device=nets.device)[:, None, None] for values in (MEAN, STD))
  features = nets.clip(((pixels - mean) / std).to(nets.dtype)).image_embeds.float()
  return torch.nn.functional.normalize(features, dim=-1)


@torch.no_grad()
def advantages(nets: Nets, latents: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
  """Advantages float32[B, R] of latents [B * R, C, h, w], given originals [B, 3, H, W]."""
  generated = embed(nets, decode(nets, latents)).unflatten(0, (len(originals), -1))
  rewards = torch.einsum("bre,be->br", generated, embed(nets, originals))
  return (rewards - rewards.mean(dim=1, keepdim=True)) / (rewards.std(dim=1, keepdim=True) + 1e-4)


def originals(nets: Nets, images) -> torch.Tensor:
  """Converts images uint8[B, H, W, 3] to float32[B, 3, H, W] in [-1, 1]."""
  return nets.tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1
