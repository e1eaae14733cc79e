"""Base models: trains the captioner by next-token prediction of captions, with and without the image.

In the small world this replaces the pre-training of Qwen2.5-VL. Captions may be partial. Rows without an image use the
generation template, so that the language model's states of a caption alone, which condition the decoder, are trained
too.
"""

import jax
import jax.numpy as jnp

from uae_jax.algorithms.losses import Loss
from uae_jax.models.prompts import generation_rows
from uae_jax.models.uae import captioner_images
from uae_jax.networks import Networks
from uae_jax.options import CaptionerOptions
from uae_jax.rollouts import captions
from uae_jax.training import row_draws
from uae_jax.training.stages.spec import StageSpec
from uae_jax.training.supervised import LossFunction


def make_loss(networks: Networks, options: CaptionerOptions) -> LossFunction:
  """Makes loss(params, batch, keys), the mean negative log-likelihood per token of the captions.

  The loss on captions without an image is added with its weight and divided by the same number of tokens.

  The batch has `image` uint8[B, H, W, 3] and `tokens` int32[B, L].
  """
  prompts = networks.prompts

  def loss(params, batch, keys):
    model = networks.uae(params, adapters=False)
    images = captioner_images(batch).astype(jnp.float32)
    images = images + options.pixel_noise_std_255 * row_draws.draw(jax.random.normal, keys, *images.shape[1:])
    tokens = batch["tokens"]
    mask = captions.caption_mask(tokens, prompts)
    log_probs, _ = captions.caption_log_probs(model, prompts, images, tokens[:, None], has_whole_vocabulary=True)
    with_image, num_tokens = -jnp.sum(log_probs[:, 0] * mask), jnp.sum(mask).astype(jnp.float32)

    rows, row_mask = generation_rows(prompts, tokens, mask)
    captioner = model.captioner
    hidden = captioner.states(captioner.embed(rows), captioner.text_positions(row_mask), row_mask)
    text_log_probs, _ = captions.token_log_probs(captioner, hidden[:, None, :-1], rows[:, None, 1:])
    # The template's tokens are constant, so only the tokens after the prefix enter the loss.
    counted = row_mask[:, 1:] & (jnp.arange(1, rows.shape[1]) >= len(prompts.generation_prefix))
    text_only = -jnp.sum(text_log_probs[:, 0] * counted)
    return Loss(with_image + options.text_only_weight * text_only, num_tokens), {
      "nll": (with_image, num_tokens),
      "nll_text_only": (text_only, jnp.sum(counted)),
      "caption_length": (num_tokens, jnp.float32(len(tokens))),
    }

  return loss


SPEC = StageSpec(
  make_loss=lambda config, built: make_loss(built.networks, config.captioner.options),
  figures=lambda evaluator, folder, params, before: evaluator.caption_figures(params),
)
