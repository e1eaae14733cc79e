"""Embedders inside a jitted step."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from uae_jax.layers.resize import resize

NORM_FLOOR = 1e-12


@dataclasses.dataclass(frozen=True)
class EmbeddingNetwork:
  """An embedder as a pure function of its parameters, to be called inside jit.

  Attributes:
    kind: one of `registry.KINDS`; names the architecture in logs.
    graphdef: graphdef of a module that maps normalized pixels float[B, height, width, 3] to features float[B, E], and
      by `patch_states` to those of its patches float[B, patches, D].
    image_px: side, in pixels, of the square that images are stretched to.
    mean: channel means of pixels in [0, 1].
    std: channel standard deviations of pixels in [0, 1].
  """

  kind: str
  graphdef: nnx.GraphDef
  image_px: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]

  def __call__(self, params: dict, images: jax.Array) -> jax.Array:
    """Unit-norm embeddings of images, differentiable in both arguments.

    The whole image is stretched to the embedder's size by torch's bicubic filter without antialiasing, as in the
    official cold-start loss; images of that size are not resized. Computes in the dtype of the parameters.

    Args:
      params: parameters of the embedder, nested dict of arrays.
      images: float[B, H, W, 3] in [-1, 1].

    Returns:
      float32[B, E].
    """
    return self.embed_pixels(params, self._pixels(images))

  def embed_patches(self, params: dict, images: jax.Array) -> jax.Array:
    """Unit-norm states of all patches in a row, so that a cosine of two results is the mean cosine of their patches.

    Args:
      params: parameters of the embedder, nested dict of arrays.
      images: float[B, H, W, 3] in [-1, 1], resized as by a call.

    Returns:
      Unit-norm float32[B, patches * D].
    """
    model, pixels = nnx.merge(self.graphdef, params), self._pixels(images)
    states = _unit(model.patch_states(pixels.astype(params["patch_embed"]["kernel"].dtype)))
    return states.reshape(len(images), -1) / jnp.sqrt(states.shape[1])

  def _pixels(self, images: jax.Array) -> jax.Array:
    pixels = resize(0.5 * images.astype(jnp.float32) + 0.5, self.image_px, self.image_px)
    return (pixels - jnp.asarray(self.mean)) / jnp.asarray(self.std)

  def embed_pixels(self, params: dict, pixels: jax.Array) -> jax.Array:
    """Unit-norm embeddings float32[B, E] of pixels float[B, height, width, 3] that are resized and normalized."""
    dtype = params["patch_embed"]["kernel"].dtype
    return _unit(nnx.merge(self.graphdef, params)(pixels.astype(dtype)))


def _unit(x: jax.Array) -> jax.Array:
  x = x.astype(jnp.float32)
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), NORM_FLOOR)
