"""The auto-encoder as three functions: caption an image, condition the decoder on the caption, generate the image.

Cold start, both RL stages, evaluation and the Python API share these functions.
"""

import jax
import jax.numpy as jnp

from uae_jax.models.prompts import Prompts, Questions
from uae_jax.models.system import System
from uae_jax.models.uae import UAE, captioner_images
from uae_jax.networks import Networks
from uae_jax.options.sampling import DATASET
from uae_jax.rollouts import captions, systems
from uae_jax.rollouts.captions import Captions
from uae_jax.rollouts.conditioning import Context, answer_context, encode_captions, encode_negative
from uae_jax.rollouts.guidance_interval import EVERYWHERE, Interval


def caption(
  model: UAE,
  prompts: Prompts,
  images: jax.Array,
  key: jax.Array,
  *,
  max_new_tokens: int,
  temperature: float | jax.Array,
  num_rollouts: int = 1,
  top_k: int = 0,
  top_p: float = 1.0,
  min_p: float = 0.0,
  repetition_penalty: float = 1.0,
  questions: Questions | None = None,
) -> Captions:
  """Samples captions of images uint8[B, h, w, 3], or answers to questions; see `captions.sample_captions`."""
  return captions.sample_captions(
    model.captioner,
    prompts,
    captions.caption_prefix(model, prompts, images, questions),
    key,
    num_rollouts=num_rollouts,
    max_tokens=max_new_tokens,
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    min_p=min_p,
    repetition_penalty=repetition_penalty,
    questions=questions,
  )


def caption_tokens(networks: Networks, params: dict, batch: dict, key: jax.Array, options) -> jax.Array:
  """One caption per row of a batch, int32[B, L]: that of the data, or a sampled one, as `options.captions` says."""
  if options.captions == DATASET:
    return batch["tokens"]
  return caption(
    networks.uae(params),
    networks.prompts,
    captioner_images(batch),
    key,
    max_new_tokens=options.max_new_tokens,
    **options.token_sampling,
  ).tokens[:, 0]


def condition(
  networks: Networks, params: dict, images: jax.Array | None, tokens: jax.Array, options
) -> tuple[Context, Context | None]:
  """Computes the conditioning of captions and of the negative prompt.

  Args:
    networks: graph definitions and prompts.
    params: parameters of the policy.
    images: uint8[B, h, w, 3] at the captioner's resolution; required by conditioning "answer", else not read.
    tokens: int32[B, L], captions.
    options: `conditioning`: "text" re-encodes the caption with `text_tower` ("reference": adapters off; "policy": on),
      "answer" takes the policy's states at the caption's own positions. `guidance`: 1 needs no negative prompt.

  Returns:
    (conditioning of the captions, B rows; conditioning of the negative prompt, one row, or None without guidance).

  Raises:
    ValueError: conditioning "answer" has no images.
  """
  if options.conditioning == "answer":
    if images is None:
      raise ValueError("conditioning = 'answer' needs the captioner's images")
    context = answer_context(networks.prompts, networks.uae(params), images, tokens)
  else:
    context = encode_captions(networks.prompts, text_tower(networks, params, options), tokens)
  return context, negative_context(networks, params, context, options)


def negative_context(networks: Networks, params: dict, context: Context, options) -> Context | None:
  """Encodes the negative prompt, padded to the number of slots of `context`; None without guidance."""
  if options.guidance == 1.0:
    return None
  return encode_negative(networks.prompts, text_tower(networks, params, options), context.mask.shape[1])


def text_tower(networks: Networks, params: dict, options) -> UAE:
  """Returns the UAE that encodes text for the decoder: the policy, or the reference, which has its adapters off."""
  return networks.uae(params, adapters=options.text_tower == "policy")


def generator(networks: Networks, params: dict, options) -> System:
  """Returns the system that generates images: the policy, with the adapters of decoder and captioner.

  Where the captioner's own weights generate images, it is the `text_tower`, so that a captioner that learns does not
  change its environment.
  """
  model = networks.uae(params)
  return text_tower(networks, params, options) if model.config.generates_by_captioner else model


def generate(
  model: System,
  context: Context,
  negative: Context | None,
  noise: jax.Array,
  *,
  guidance: float,
  sampler_steps: int,
  shift: float,
  gradient_steps: int = 0,
  guidance_interval: Interval = EVERYWHERE,
) -> jax.Array:
  """Generates images from conditioning and noise, by the sampler of this kind of system, see `rollouts.systems`.

  Args:
    model: the system, see `generator`.
    context: conditioning, B rows.
    negative: conditioning of the negative prompt, one row; None without guidance.
    noise: float32[B, h, w, C], normally distributed; its shape is that of `System.latents_shape`.
    guidance: scale of classifier-free guidance; 1 disables it.
    sampler_steps: number of Euler steps of a diffusion model.
    shift: shift of its schedule towards noise.
    gradient_steps: number of its final steps that are differentiable.
    guidance_interval: noise levels (low, high] with guidance.

  Returns:
    float32[B, H, W, 3], nominally in [-1, 1], not clipped.
  """
  return systems.find(model)(
    model,
    context,
    negative,
    noise,
    guidance=guidance,
    sampler_steps=sampler_steps,
    shift=shift,
    gradient_steps=gradient_steps,
    guidance_interval=guidance_interval,
  )


def image_noise(key: jax.Array, model: System, images: jax.Array) -> jax.Array:
  """Draws noise float32[B, h, w, C] for reconstructions of images [B, H, W, 3]."""
  return jax.random.normal(key, (images.shape[0], *model.latents_shape(images)))


def clip(images: jax.Array) -> jax.Array:
  """Clips generated images to [-1, 1]."""
  return jnp.clip(images, -1.0, 1.0)
