"""Stage 0: long-context pre-training of the decoder by rectified flow on latents; the language model is frozen.

Source: arXiv 2509.09666 section 3.2 (stage 0); weighting of Stable Diffusion 3 (arXiv 2403.03206 section 3.1).
"""

import functools

import jax
import jax.numpy as jnp

from uae_jax.algorithms import flow_matching
from uae_jax.algorithms.losses import Loss, mean_square, sum_and_count
from uae_jax.models.uae import UAE, to_signed
from uae_jax.networks import Networks
from uae_jax.options import PretrainOptions, ShiftOptions
from uae_jax.rollouts.conditioning import Context, encode_captions, encode_negative
from uae_jax.training import row_draws
from uae_jax.training.stages.spec import StageSpec
from uae_jax.training.supervised import LossFunction


def flow_loss(model: UAE, images: jax.Array, context: Context, keys: jax.Array, options: ShiftOptions) -> jax.Array:
  """Computes mean (v - (noise - x))^2 of each image, float32[B].

  Args:
    model: UAE whose decoder is trained.
    images: uint8[B, H, W, 3]; x are their latents.
    context: conditioning, B rows.
    keys: PRNG keys [B].
    options: shift of the noise levels.
  """
  sigma_keys, noise_keys = row_draws.split(keys, 2)
  x = jax.lax.stop_gradient(model.encode_image(to_signed(images)))
  noise = row_draws.draw(jax.random.normal, noise_keys, *x.shape[1:])
  sigma = row_draws.draw(functools.partial(flow_matching.sample_sigmas, shift=options.shift_at(x.shape)), sigma_keys)
  velocity = model.velocity(flow_matching.interpolate(x, noise, sigma), sigma, context.states, context.mask)
  return mean_square(velocity - flow_matching.velocity_target(x, noise))


def make_loss(networks: Networks, options: PretrainOptions) -> LossFunction:
  """Makes loss(params, batch, keys) on `image` uint8[B, H, W, 3] and `tokens` int32[B, L]."""

  def loss(params, batch, keys):
    model = networks.uae(params, adapters=False)
    drop_keys, flow_keys = row_draws.split(keys, 2)
    context = encode_captions(networks.prompts, model, batch["tokens"])
    if options.context_dropout > 0:
      negative = encode_negative(networks.prompts, model, context.mask.shape[1])
      is_dropped = row_draws.draw(jax.random.uniform, drop_keys, 1) < options.context_dropout
      context = Context(
        jnp.where(is_dropped[..., None], negative.states, context.states),
        jnp.where(is_dropped, negative.mask, context.mask),
      )
    values = flow_loss(model, batch["image"], context, flow_keys, options)
    return Loss(*sum_and_count(values)), {"flow_loss": sum_and_count(values)}

  return loss


SPEC = StageSpec(
  generates_by_captioner=False,
  make_loss=lambda config, built: make_loss(built.networks, config.pretrain.options),
  figures=lambda evaluator, folder, params, before: evaluator.uae_figures(folder, params),
  runs_suites=True,
)
