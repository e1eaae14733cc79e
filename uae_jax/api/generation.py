"""The half of the Python API that makes images: from texts, and its parts."""

from collections.abc import Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from uae_jax.api.arguments import checked_whole, keys_of, noise_of, or_default
from uae_jax.api.batches import batches_of, fitting
from uae_jax.api.loaded import NOT_FINITE, Loaded
from uae_jax.data.texts import checked_texts
from uae_jax.options import GenerationOptions
from uae_jax.options.sampling import EVERYWHERE
from uae_jax.rollouts import reconstruct
from uae_jax.rollouts.conditioning import Context

# Prompts are padded to a multiple of this if the decoder does not attend to padding.
MASKED_BUCKET = 16


class Generation(Loaded):
  """Images from texts, and the parts of which that is made."""

  def encode_text(self, prompts: list[str], length: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Encodes prompts in the generation template as conditioning of the decoder.

    Args:
      prompts: B texts; they are right-padded to a common length T.
      length: T; by default the length of the longest prompt.

    Returns:
      (context float[B, T, C], mask bool[B, T], True at the slots that are not padding). The official decoder attends to
      the padding too.

    Raises:
      ValueError: there is no prompt, one is no text, or one has more than `length` tokens.
    """
    rows = [self.processor.generation_prompt(prompt) for prompt in checked_texts("prompts", prompts)]
    if not rows:
      raise ValueError("prompts = []: expected at least one text")
    return self._encode_rows(rows, length)

  def _encode_rows(self, rows: Sequence[Sequence[int]], length: int | None) -> tuple[jax.Array, jax.Array]:
    tokens, mask = self.processor.pad_rows(rows, length)
    run = self._program(("encode_text", tokens.shape), self._encode_text)
    return run(self.params, tokens, mask), jnp.asarray(mask)

  def _encode_text(self, params, tokens, mask):
    return self._model(params, adapters=self.inference.text_tower == "policy").encode_text(tokens, mask)

  def velocity(self, latents, timesteps, context, pooled=None, context_mask=None) -> jax.Array:
    """Evaluates the decoder with its adapters.

    Args:
      latents: float[B, h, w, 16], scaled.
      timesteps: float[B] in 0..1000; 1000 is pure noise.
      context: float[B, T, C], conditioning.
      pooled: float[B, P]; by default the stored embedding of the empty prompt.
      context_mask: bool[B, T]; used if the model's config sets `mask_context`. None attends to all slots.

    Returns:
      float32[B, h, w, 16].
    """
    self._require_latents("velocity")
    run = self._program(("velocity", pooled is None, context_mask is None), self._velocity)
    return run(self.params, latents, timesteps, context, pooled, context_mask)

  def _velocity(self, params, latents, timesteps, context, pooled, context_mask):
    return self._model(params).velocity(latents, timesteps / 1000.0, context, context_mask, pooled=pooled)

  def encode_image(self, images) -> jax.Array:
    """Encodes images float[B, H, W, 3] in [-1, 1] as the posterior's mode, scaled latents float32[B, h, w, 16]."""
    self._require_latents("encode_image")
    run = self._program("encode_image", lambda params, x: self._model(params).encode_image(x))
    return run(self.params, jnp.asarray(images))

  def decode_latents(self, latents) -> jax.Array:
    """Decodes scaled latents float[B, h, w, 16] to float32[B, H, W, 3], nominally in [-1, 1], not clipped."""
    self._require_latents("decode_latents")
    run = self._program("decode_latents", lambda params, z: self._model(params).decode_latents(z))
    return run(self.params, jnp.asarray(latents))

  def _require_latents(self, method: str) -> None:
    if self._config.generates_by_captioner:
      raise ValueError(f"{method}: images of this model are tokens, it has no latents")

  def latents_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
    """Shape (h, w, C) of the latents of an image.

    Args:
      height: height in pixels; by default that of the weights.
      width: width in pixels; same default.

    Raises:
      ValueError: the decoder's patches or position table do not allow the size.
    """
    height = checked_whole("height", or_default(height, self.inference.resolution_px), -math.inf, math.inf)
    width = checked_whole("width", or_default(width, self.inference.resolution_px), -math.inf, math.inf)
    return self._config.latents_shape(height, width)

  def generate(
    self,
    prompts: list[str],
    steps: int | None = None,
    guidance: float | None = None,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    latents=None,
    output: str = "pil",
    *,
    indices: Sequence[int] | None = None,
    batch_size: int | None = None,
    guidance_interval: Sequence[float] | None = None,
  ):
    """Generates one image per prompt.

    Args:
      prompts: B texts.
      steps: number of Euler steps; by default that of the weights (official: 40). A model that generates images token
        by token has no other than its own, and no `guidance_interval`.
      guidance: scale of classifier-free guidance, 1 disables it; by default that of the weights (official: 5).
      height: height of the images in pixels; by default that of the weights (official: 1024).
      width: width of the images in pixels; same default.
      seed: random seed, 0 to 2^32 - 1; the initial noise of an image depends only on the seed and the image's index.
      latents: initial noise float[B, h, w, 16]; None draws it from the seed.
      output: "pil", or "array" for float32[B, H, W, 3] in 0..1.
      indices: index of each image in a larger job, for the same results in any batches; by default 0, 1, ...
      batch_size: maximum number of images per batch; by default 2 at 1024 px, 8 at 512 px. Prompts of one length share
        batches, which are padded to a power of two; an image does not depend on its batch, up to rounding.
      guidance_interval: noise levels (low, high] with guidance, half the work outside of it; by default that of the
        weights (all levels).

    Raises:
      ValueError: the decoder's patches or position table do not allow the size, the output is unknown, an option is out
        of range, the latents have another shape, or the model's numbers are not finite.
    """
    prompts = checked_texts("prompts", prompts)
    if output not in ("pil", "array"):
      raise ValueError(f"output = {output!r}: expected 'pil' or 'array'")
    if self._config.generates_by_captioner:
      if steps not in (None, self.inference.steps):
        raise ValueError(f"steps = {steps}: this model generates images token by token, remove it")
      if guidance_interval is not None and tuple(guidance_interval) != self.inference.guidance_interval:
        raise ValueError(f"guidance_interval = {guidance_interval}: this model guides every token, remove it")
    steps, guidance = or_default(steps, self.inference.steps), or_default(guidance, self.inference.guidance)
    if guidance_interval is None:
      guidance_interval = EVERYWHERE if guidance == 1.0 else self.inference.guidance_interval
    interval: Any = tuple(or_default(limit, 0.0) for limit in guidance_interval)
    options = GenerationOptions(sampler_steps=steps, guidance=guidance, guidance_interval=interval)
    shape = self.latents_shape(height, width)
    if latents is None:
      noise = noise_of(keys_of(seed, indices, len(prompts)), shape)
    else:
      noise = np.asarray(latents, np.float32)
      expected = (len(prompts), *(shape if height or width else (*np.shape(latents)[1:3], shape[-1])))
      if np.shape(latents) != expected:
        raise ValueError(f"latents have the shape {list(np.shape(latents))}, expected {list(expected)}")
      pixels_per_cell = or_default(height, self.inference.resolution_px) // shape[0]
      self._config.latents_shape(*(pixels_per_cell * side for side in expected[1:3]))
    negative = [] if guidance == 1.0 else [self.processor.negative_row()]
    texts = [self.processor.generation_prompt(prompt) for prompt in prompts]
    lengths = self._context_lengths(texts, negative)
    generated = [np.zeros(0)] * len(prompts)
    for rows in batches_of(lengths, or_default(batch_size, fitting(shape))):
      context, mask = self._encode_rows([*negative, *(texts[row] for row in rows)], lengths[rows[0]])
      batch = noise[np.asarray(rows)]
      run = self._program(("generate", batch.shape, context.shape, options), self._generate_batch(options))
      images = np.asarray(run(self.params, batch, context, mask))
      if not np.all(np.isfinite(images)):
        raise ValueError(f"a generated image has pixels that are not finite numbers: {NOT_FINITE}")
      for row, image in zip(rows, images, strict=True):
        generated[row] = image
    clipped = [np.clip(image / 2 + 0.5, 0.0, 1.0) for image in generated]
    if output == "array":
      size = (height or self.inference.resolution_px, width or self.inference.resolution_px)
      return np.stack(clipped) if clipped else np.zeros((0, *size, 3), np.float32)
    return [Image.fromarray(np.round(image * 255).astype(np.uint8)) for image in clipped]

  def _context_lengths(self, texts: Sequence[Sequence[int]], negative: Sequence[Sequence[int]]) -> list[int]:
    """Number of tokens to which each templated prompt is padded.

    As in the official pipeline, that is the longer one of prompt and negative prompt: the official decoder attends to
    the padding. A decoder that masks it needs fewer programs with multiples of `MASKED_BUCKET`.
    """
    least, *_ = *map(len, negative), 0
    bucket = MASKED_BUCKET if self._config.masks_padding else 1
    lengths = [max(least, len(text)) for text in texts]
    return [math.ceil(length / bucket) * bucket for length in lengths]

  def _generate_batch(self, options: GenerationOptions):
    # As `rollouts.reconstruct.generator`.
    adapters = not self._config.generates_by_captioner or self.inference.text_tower == "policy"

    def run(params, noise, context, mask):
      model, count = self._model(params, adapters=adapters), len(noise)
      negative = None if options.guidance == 1.0 else Context(context[:1], mask[:1])
      own = Context(context[-count:], mask[-count:])
      return reconstruct.generate(
        model,
        own,
        negative,
        noise,
        guidance=options.guidance,
        guidance_interval=options.guidance_interval,
        sampler_steps=options.sampler_steps,
        shift=self.inference.shift,
      )

    return run
