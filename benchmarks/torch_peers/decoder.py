"""Images with the SD3 transformer: guided Euler sampling, stochastic groups and their replay."""

from collections.abc import Callable
import math

import numpy as np
import torch

from benchmarks.torch_peers.nets import Nets

NOISE_LEVEL = 0.7


def schedule(nets: Nets, steps: int, shift: float = 3.0) -> tuple[list[float], torch.Tensor]:
  """(N + 1 noise levels, N timesteps on the device) of diffusers' FlowMatchEulerDiscreteScheduler.

  The levels are numbers of the host: the scheduler's own step reads them from the device, which waits for it.
  """
  ends = np.array([1.0, 0.001])
  ends = shift * ends / (1 + (shift - 1) * ends)
  line = np.linspace(*ends, steps)
  levels = shift * line / (1 + (shift - 1) * line)
  timesteps = torch.tensor(1000 * levels, dtype=torch.float32, device=nets.device)
  return [*levels.tolist(), 0.0], timesteps


def make_velocity(nets: Nets, model) -> Callable:
  """Makes the function (latents [B, C, h, w], timestep, context) -> velocity float32[B, C, h, w]."""
  pooled = nets.pooled.to(nets.dtype)

  def velocity(latents, timestep, context):
    rows = len(latents)
    return model(
      hidden_states=latents.to(nets.dtype),
      timestep=timestep.expand(rows),
      encoder_hidden_states=context,
      pooled_projections=pooled.expand(rows, -1),
      return_dict=False,
    )[0].float()

  return nets.compiled(velocity)


@torch.no_grad()
def sample(nets: Nets, velocity, context, latents, steps: int, *, negative=None, guidance: float = 1.0):
  """Sampling loop of StableDiffusion3Pipeline, with both guidance branches in one batch."""
  sigmas, timesteps = schedule(nets, steps)
  for i, timestep in enumerate(timesteps):
    if guidance == 1.0:
      v = velocity(latents, timestep, context)
    else:
      both = velocity(torch.cat([latents, latents]), timestep, torch.cat([negative.expand_as(context), context]))
      without, given = both.chunk(2)
      v = without + guidance * (given - without)
    latents = latents + (sigmas[i + 1] - sigmas[i]) * v
  return latents


def sde_moments(v, latents, sigma, sigma_next, sigma_first):
  """(mean, std) of a step of Flow-GRPO's sampler. Source: sde_step_with_logprob in its authors' code."""
  change = sigma_next - sigma
  g = NOISE_LEVEL * math.sqrt(sigma / (1 - (sigma_first if sigma == 1 else sigma)))
  mean = latents * (1 + g**2 / (2 * sigma) * change) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * change
  return mean, g * math.sqrt(-change)


def log_prob(after, mean, std):
  """Gaussian log-density float32[B], averaged over elements."""
  values = -((after - mean) ** 2) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
  return values.mean(dim=(1, 2, 3))


@torch.no_grad()
def sample_group(nets: Nets, velocity, context, noise, steps: int, window: int):
  """Stochastic steps, then Euler steps; returns (the window + 1 latents of the stochastic steps, final latents)."""
  sigmas, timesteps = schedule(nets, steps)
  latents, kept = noise, [noise]
  for i, timestep in enumerate(timesteps):
    v = velocity(latents, timestep, context)
    if i < window:
      mean, std = sde_moments(v, latents, sigmas[i], sigmas[i + 1], sigmas[1])
      latents = mean + std * torch.randn_like(mean)
      kept.append(latents)
    else:
      latents = latents + (sigmas[i + 1] - sigmas[i]) * v
  return kept, latents


def flow_update(nets: Nets, velocity, kept, context, advantages, steps: int, optimizer) -> tuple[float, float]:
  """One update of Flow-GRPO with a backward pass per window step, as in its code; returns (loss, gradient norm)."""
  sigmas, timesteps = schedule(nets, steps)
  window, total = len(kept) - 1, 0.0
  for i in range(window):
    v = velocity(kept[i], timesteps[i], context)
    mean, std = sde_moments(v, kept[i], sigmas[i], sigmas[i + 1], sigmas[1])
    new = log_prob(kept[i + 1], mean, std)
    ratio = torch.exp(new - new.detach())
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - 1e-4, 1 + 1e-4) * advantages).mean() / window
    loss.backward()
    total = total + loss.detach()
  return float(total), optimizer.step()
