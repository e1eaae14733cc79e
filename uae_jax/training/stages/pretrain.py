"""Stage 0: long-context pre-training of the decoder by rectified flow on latents; the language model is frozen.

Source: arXiv 2509.09666 section 3.2 (stage 0); weighting of Stable Diffusion 3 (arXiv 2403.03206 section 3.1).
"""

import jax
import jax.numpy as jnp

from uae_jax.algorithms import flow_matching
from uae_jax.models.uae import UAE, to_signed
from uae_jax.networks import Networks
from uae_jax.options import PretrainOptions
from uae_jax.rollouts.conditioning import Context, encode_captions, encode_negative
from uae_jax.training.stages.spec import StageSpec
from uae_jax.training.supervised import Loss


def flow_loss(model: UAE, images: jax.Array, context: Context, key: jax.Array, shift: float) -> jax.Array:
  """Computes mean (v - (noise - x))^2 over a batch of images uint8[B, H, W, 3]; x are their latents."""
  sigma_key, noise_key = jax.random.split(key)
  x = jax.lax.stop_gradient(model.encode_image(to_signed(images)))
  noise = jax.random.normal(noise_key, x.shape)
  sigma = flow_matching.sample_sigmas(sigma_key, (x.shape[0],), shift=shift)
  velocity = model.velocity(flow_matching.interpolate(x, noise, sigma), sigma, context.states, context.mask)
  return jnp.mean(jnp.square(velocity - flow_matching.velocity_target(x, noise)))


def make_loss(networks: Networks, options: PretrainOptions) -> Loss:
  """Makes loss(params, batch, key) on `image` uint8[B, H, W, 3] and `tokens` int32[B, L]."""

  def loss(params, batch, key):
    model = networks.uae(params, adapters=False)
    drop_key, flow_key = jax.random.split(key)
    context = encode_captions(networks.prompts, model, batch["tokens"])
    if options.context_dropout > 0:
      negative = encode_negative(networks.prompts, model, context.mask.shape[1])
      is_dropped = jax.random.bernoulli(drop_key, options.context_dropout, (context.mask.shape[0], 1))
      context = Context(
        jnp.where(is_dropped[..., None], negative.states, context.states),
        jnp.where(is_dropped, negative.mask, context.mask),
      )
    value = flow_loss(model, batch["image"], context, flow_key, options.shift)
    return value, {"flow_loss": value}

  return loss


SPEC = StageSpec(
  make_loss=lambda config, built: make_loss(built.networks, config.pretrain.options),
  figures=lambda evaluator, folder, params, before: evaluator.uae_figures(folder, params),
)
