"""Reconstruction of held-out images: caption them, generate them from the caption alone, and compare with the original.

Noise and sampling keys depend only on the options, so metrics of different stages are paired.
"""

from collections.abc import Callable, Iterator
import functools
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from uae_jax.models.uae import to_signed
from uae_jax.networks import Networks
from uae_jax.options import EvaluationOptions
from uae_jax.rollouts import captions, reconstruct


class Reconstructor:
  """Captions and reconstructs images by jitted functions of one batch size; the last batch is padded."""

  def __init__(self, networks: Networks, options: EvaluationOptions):
    self.networks = networks
    self.options = options
    self._caption = jax.jit(self._caption_batch)
    self._generate = jax.jit(self._generate_batch)
    self._embed = jax.jit(self._embed_batch, static_argnames="name")
    self._autoencode = jax.jit(self._autoencode_batch)
    self._log_probs = jax.jit(self._log_probs_batch)

  def _caption_batch(self, params: dict, images: jax.Array, key: jax.Array, temperature: jax.Array) -> jax.Array:
    model = self.networks.uae(params)
    return reconstruct.caption(
      model,
      self.networks.prompts,
      images,
      key,
      max_new_tokens=self.options.max_new_tokens,
      temperature=temperature,
    ).tokens[:, 0]

  def _generate_batch(
    self, params: dict, images: jax.Array, captioner_images: jax.Array, tokens: jax.Array, key: jax.Array
  ):
    options, networks = self.options, self.networks
    model = reconstruct.generator(networks, params, options)
    context, negative = reconstruct.condition(networks, params, captioner_images, tokens, options)
    x = to_signed(images)
    generated = reconstruct.generate(
      model,
      context,
      negative,
      reconstruct.image_noise(key, model, x),
      guidance=options.guidance,
      guidance_interval=options.guidance_interval,
      sampler_steps=options.sampler_steps,
      shift=options.shift_at(model.latents_shape(x)),
    )
    reconstructions = reconstruct.clip(generated)
    similarities = {
      name: jnp.sum(networks.embed(params, name, x) * networks.embed(params, name, reconstructions), axis=-1)
      for name in options.embedders
    }
    return reconstructions, similarities | {"psnr": psnr(x, reconstructions)}

  def _embed_batch(self, params: dict, images: jax.Array, name: str) -> jax.Array:
    return self.networks.embed(params, name, to_signed(images))

  def _autoencode_batch(self, params: dict, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    model, x = self.networks.uae(params), to_signed(images)
    decoded = jnp.clip(model.autoencode(x), -1.0, 1.0)
    return decoded, psnr(x, decoded)

  def _log_probs_batch(self, params: dict, images: jax.Array, tokens: jax.Array) -> jax.Array:
    networks = self.networks
    log_probs, _ = captions.caption_log_probs(
      networks.uae(params), networks.prompts, images, tokens, has_whole_vocabulary=True
    )
    return jnp.sum(log_probs * captions.caption_mask(tokens, networks.prompts), axis=-1)

  def caption_log_probs(self, params: dict, images: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Computes log-probabilities of whole captions.

    Args:
      params: parameters of the UAE.
      images: uint8[N, h, w, 3] at the captioner's resolution.
      tokens: int32[N, R, L], R captions per image, which share its prefix.

    Returns:
      float32[N, R], sums over the tokens up to and including the closing one.
    """
    return self._gather(len(images), lambda _, rows: self._log_probs(params, images[rows], tokens[rows]))

  def embed(self, params: dict, name: str, images: np.ndarray) -> np.ndarray:
    """Embeds images uint8[N, H, W, 3] as unit-norm float32[N, E]."""
    return self._gather(len(images), lambda _, rows: self._embed(params, images[rows], name=name))

  def autoencode(self, params: dict, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reconstructs images by the VAE alone.

    Args:
      params: parameters with the VAE under "vae".
      images: uint8[N, H, W, 3].

    Returns:
      (reconstructions float32[N, H, W, 3] in [-1, 1], PSNR float32[N] in dB).
    """
    return self._gather(len(images), lambda _, rows: self._autoencode(params, images[rows]))

  def _batches(self, count: int) -> Iterator[tuple[int, np.ndarray]]:
    size = self.options.batch_size
    for start in range(0, count, size):
      yield start // size, np.minimum(np.arange(start, start + size), count - 1)

  def _gather(self, count: int, run: Callable[[int, np.ndarray], Any]) -> Any:
    """Concatenates run(batch index, row indices) over all batches and drops the padding."""
    # Also gathers the rows on the devices of other processes.
    outputs = [multihost_utils.process_allgather(run(index, rows), tiled=True) for index, rows in self._batches(count)]
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *outputs)

  def caption(self, params: dict, images: np.ndarray, *, temperature: float) -> np.ndarray:
    """Captions images uint8[N, h, w, 3] as tokens int32[N, L]; temperature 0 takes the most likely token."""
    key = jax.random.fold_in(jax.random.key(self.options.seed), 1)
    temperature = jnp.float32(temperature)
    return self._gather(
      len(images), lambda i, rows: self._caption(params, images[rows], jax.random.fold_in(key, i), temperature)
    )

  def generate(
    self,
    params: dict,
    images: np.ndarray,
    tokens: np.ndarray,
    *,
    captioner_images: np.ndarray | None = None,
    num_noises: int = 1,
  ) -> tuple[np.ndarray, dict]:
    """Generates images from captions and compares them with the originals.

    Args:
      params: parameters of the UAE and of the embedders.
      images: uint8[N, H, W, 3], originals.
      tokens: int32[N, L], captions.
      captioner_images: uint8[N, h, w, 3], the same images at the captioner's resolution, read for conditioning
        "answer"; None for `images`.
      num_noises: number of reconstructions per image, over which the similarities are averaged.

    Returns:
      (reconstructions float32[N, H, W, 3] in [-1, 1] from the first noise, {name of the embedder or "psnr": float32[N],
      averaged over the noises}).
    """
    results = []
    arrays = (images, images if captioner_images is None else captioner_images, tokens)
    for noise in range(num_noises):
      key = jax.random.fold_in(jax.random.key(self.options.seed), 100 + noise)
      run = functools.partial(self._generate_rows, params, arrays, key)
      results.append(self._gather(len(images), run))
    figures = {name: np.mean([scores[name] for _, scores in results], axis=0) for name in results[0][1]}
    return results[0][0], figures

  def _generate_rows(self, params, arrays, key, index, rows):
    return self._generate(params, *(array[rows] for array in arrays), jax.random.fold_in(key, index))


def psnr(x: jax.Array, y: jax.Array) -> jax.Array:
  """Computes the peak signal-to-noise ratio in dB, float32[B], of images float[B, H, W, 3] in [-1, 1]."""
  return 10.0 * jnp.log10(4.0 / jnp.mean(jnp.square(x - y), axis=(1, 2, 3)))


def paired_gain(before: np.ndarray, after: np.ndarray) -> dict:
  """Computes the mean of after - before over paired images, and its standard error."""
  difference = np.asarray(after, np.float64) - np.asarray(before, np.float64)
  return {
    "gain": float(np.mean(difference)),
    "standard_error": float(np.std(difference, ddof=1) / np.sqrt(len(difference))),
  }
