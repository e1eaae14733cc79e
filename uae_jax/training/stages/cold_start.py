"""Stage 1, semantic reconstruction: captions the image, generates it again from the caption, and compares the two.

Gradients flow from the similarity through embedder, VAE and sampler.

Source: arXiv 2509.09666 section 3.2 (stage 1): loss mean(1 - cos(CLIP(x_hat), CLIP(x))) through sampler, VAE and CLIP.
"""

import jax
import jax.numpy as jnp

from uae_jax.algorithms.losses import Loss, sum_and_count
from uae_jax.models.uae import captioner_images, to_signed
from uae_jax.networks import Networks
from uae_jax.options import ColdStartOptions
from uae_jax.options.sampling import DATASET, SAMPLED
from uae_jax.rollouts import reconstruct
from uae_jax.rollouts.conditioning import encode_captions
from uae_jax.training import row_draws
from uae_jax.training.stages.pretrain import flow_loss
from uae_jax.training.stages.spec import StageSpec
from uae_jax.training.supervised import LossFunction


def make_loss(networks: Networks, options: ColdStartOptions) -> LossFunction:
  """Makes loss(params, batch, keys) on `image` uint8[B, H, W, 3] and `tokens` int32[B, L]."""

  def loss(params, batch, keys):
    model = networks.uae(params)
    caption_keys, noise_keys, flow_keys = row_draws.split(keys, 3)
    images, tokens = captioner_images(batch), batch["tokens"]
    if options.captions == SAMPLED:
      sampler = networks.uae(jax.lax.stop_gradient(params))
      sizes = dict(max_new_tokens=tokens.shape[1], **options.token_sampling)
      tokens = reconstruct.caption(sampler, networks.prompts, images, caption_keys, **sizes).tokens[:, 0]
    # The official code truncates the negative prompt to the caption's length; ours pads and masks it, or raises an
    # error if it is longer.
    context, negative = reconstruct.condition(networks, params, images, tokens, options)
    target = to_signed(batch["image"])
    generated = reconstruct.generate(
      model,
      context,
      negative,
      row_draws.draw(jax.random.normal, noise_keys, *model.latents_shape(target)),
      guidance=options.guidance,
      guidance_interval=options.guidance_interval,
      sampler_steps=options.sampler_steps,
      shift=options.shift_at(model.latents_shape(target)),
      gradient_steps=options.gradient_steps,
    )
    # Wider than the image's range: a hard clip at +-1 would stop the gradient of every saturated pixel.
    reconstructions = jnp.clip(generated, -1.2, 1.2)
    gap = networks.embed(params, options.embedder, reconstructions) - networks.embed(params, options.embedder, target)
    # Equals 1 - cos for unit vectors, but avoids the cancellation of subtracting a value near 1 from 1.
    values = 0.5 * jnp.sum(jnp.square(gap), axis=-1)
    metrics = {"similarity": sum_and_count(1.0 - values)}
    if options.flow_weight > 0:
      own = encode_captions(networks.prompts, reconstruct.text_tower(networks, params, options), batch["tokens"])
      flow = flow_loss(model, batch["image"], own, flow_keys, options)
      metrics["flow_loss"] = sum_and_count(flow)
      values = values + options.flow_weight * flow
    return Loss(*sum_and_count(values)), metrics

  return loss


SPEC = StageSpec(
  generates_by_captioner=False,
  make_loss=lambda config, built: make_loss(built.networks, config.cold_start.options),
  embedders=lambda options: {"embedder": options.embedder},
  samples_captions=lambda options: int(options.captions == SAMPLED),
  needs_captions=lambda options: options.captions == DATASET or options.flow_weight > 0,
  figures=lambda evaluator, folder, params, before: evaluator.uae_figures(folder, params),
  runs_suites=True,
)
