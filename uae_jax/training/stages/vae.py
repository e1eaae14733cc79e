"""Base models: trains the VAE by reconstruction with a small KL term.

There is no adversarial loss, because the small world has no texture that the VAE would have to invent.
"""

import jax
import jax.numpy as jnp

from uae_jax.algorithms.losses import Loss, mean_square, sum_and_count
from uae_jax.models.uae import to_signed
from uae_jax.networks import Networks
from uae_jax.options import VAEOptions
from uae_jax.training import row_draws
from uae_jax.training.build import Built
from uae_jax.training.stages.spec import StageSpec
from uae_jax.training.supervised import LossFunction


def make_loss(networks: Networks, options: VAEOptions) -> LossFunction:
  """Makes loss(params, batch, keys) on `image` uint8[B, H, W, 3].

  Source: arXiv 2112.10752 appendix G, without the adversarial loss.
  """

  def loss(params, batch, keys):
    vae = networks.uae(params).vae
    x = to_signed(batch["image"])
    mean, log_var = vae.encode(x)
    sample = mean + jnp.exp(0.5 * log_var) * row_draws.draw(jax.random.normal, keys, *mean.shape[1:])
    # During training the latent shift is 0 and the scaling 1; `finish` standardizes the latents.
    error = vae.decode(vae.to_latents(sample)) - x
    squared, absolute = mean_square(error), jnp.mean(jnp.abs(error), axis=(1, 2, 3))
    kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_var) - 1.0 - log_var, axis=(1, 2, 3))
    values = squared + options.absolute_weight * absolute + options.kl_weight * kl
    return Loss(*sum_and_count(values)), {
      "psnr": sum_and_count(10.0 * jnp.log10(4.0 / squared)),
      "latent_kl": sum_and_count(kl),
    }

  return loss


def standardize_latents(networks: Networks, params: dict, images: jax.Array) -> dict:
  """Sets latent shift and scaling so that the latents of `images` have mean 0 and std 1 per channel.

  Args:
    networks: provides the VAE.
    params: nested dict of arrays, with the VAE under "vae".
    images: uint8[B, H, W, 3].

  Returns:
    `params` with the new statistics.
  """
  mean, _ = networks.uae(params).vae.encode(to_signed(images))
  vae = {
    **params["vae"],
    "latent_shift": jnp.mean(mean, axis=(0, 1, 2)),
    "latent_scaling": 1.0 / jnp.std(mean, axis=(0, 1, 2)),
  }
  return {**params, "vae": vae}


def finish(built: Built, params: dict, images: jax.Array) -> dict:
  """Runs `standardize_latents` on the last batch."""
  return jax.jit(lambda params, images: standardize_latents(built.networks, params, images))(params, images)


SPEC = StageSpec(
  generates_by_captioner=False,
  make_loss=lambda config, built: make_loss(built.networks, config.vae.options),
  finish=finish,
  needs_captions=lambda options: False,
  figures=lambda evaluator, folder, params, before: evaluator.vae_figures(params),
)
