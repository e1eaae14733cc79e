"""The auto-encoder in three calls: caption an image, condition the decoder on the caption, generate the image again.

Cold start, both RL stages, evaluation and the Python API use these.
"""

import jax
import jax.numpy as jnp

from uae_jax.models.prompts import Prompts
from uae_jax.models.uae import UAE
from uae_jax.networks import Networks
from uae_jax.rollouts import captions
from uae_jax.rollouts.captions import Captions
from uae_jax.rollouts.conditioning import Context, answer_context, encode_captions, encode_negative
from uae_jax.rollouts.images import sample_ode, velocity_field


def caption(
  model: UAE,
  prompts: Prompts,
  images: jax.Array,
  key: jax.Array,
  *,
  max_new_tokens: int,
  temperature: float | jax.Array,
  num_rollouts: int = 1,
  repetition_penalty: float = 1.0,
) -> Captions:
  """Samples captions of images uint8[B, h, w, 3]; see `captions.sample_captions`."""
  return captions.sample_captions(
    model.captioner,
    prompts,
    captions.caption_prefix(model, prompts, images),
    key,
    num_rollouts=num_rollouts,
    max_tokens=max_new_tokens,
    temperature=temperature,
    repetition_penalty=repetition_penalty,
  )


def condition(
  networks: Networks, params: dict, images: jax.Array, tokens: jax.Array, options
) -> tuple[Context, Context | None]:
  """What the decoder sees of captions, and of the negative prompt.

  Args:
    networks: of the run.
    params: of the policy.
    images: uint8[B, h, w, 3] at the captioner's resolution; read for conditioning "answer" only.
    tokens: int32[B, L].
    options: `conditioning`: "text" re-encodes the caption with `text_tower` ("reference": adapters off; "policy": on),
      "answer" takes the policy's states at the caption's own positions. `guidance`: 1 needs no negative prompt.

  Returns:
    (context of every caption, context of the negative prompt in one row, or None without guidance).
  """
  if options.conditioning == "answer":
    context = answer_context(networks.prompts, networks.uae(params), images, tokens)
  else:
    context = encode_captions(networks.prompts, text_tower(networks, params, options), tokens)
  return context, negative_context(networks, params, context, options)


def negative_context(networks: Networks, params: dict, context: Context, options) -> Context | None:
  """The negative prompt in as many slots as `context` has, or None without guidance."""
  if options.guidance == 1.0:
    return None
  return encode_negative(networks.prompts, text_tower(networks, params, options), context.mask.shape[1])


def text_tower(networks: Networks, params: dict, options) -> UAE:
  """The UAE that encodes text for the decoder: the policy, or the reference with its adapters off."""
  return networks.uae(params, adapters=options.text_tower == "policy")


def generate(
  model: UAE,
  context: Context,
  negative: Context | None,
  noise: jax.Array,
  *,
  guidance: float,
  sampler_steps: int,
  shift: float,
  gradient_steps: int = 0,
) -> jax.Array:
  """Samples latents by ODE and decodes them.

  Args:
    model: whose decoder and vae are used.
    context: of B captions.
    negative: of `condition`; None without guidance.
    noise: float32[B, h, w, 16].
    guidance: classifier-free guidance.
    sampler_steps: Euler steps.
    shift: of the schedule.
    gradient_steps: the last `gradient_steps` of them are differentiable.

  Returns:
    float32[B, H, W, 3], nominally in [-1, 1], not clipped.
  """
  velocity = velocity_field(model, context, guidance=guidance, negative=negative)
  return model.decode_latents(
    sample_ode(velocity, noise, num_steps=sampler_steps, shift=shift, gradient_steps=gradient_steps)
  )


def image_noise(key: jax.Array, model: UAE, images: jax.Array) -> jax.Array:
  """Initial noise float32[B, h, w, 16] for reconstructions of images [B, H, W, 3]."""
  return jax.random.normal(key, (images.shape[0], *model.latents_shape(images)))


def clip(images: jax.Array) -> jax.Array:
  """Generated images, clipped to [-1, 1]."""
  return jnp.clip(images, -1.0, 1.0)
