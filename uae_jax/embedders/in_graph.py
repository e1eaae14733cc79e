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
    graphdef: graphdef of a module that maps normalized pixels float[B, height, width, 3] to features float[B, E].
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
    pixels = resize(0.5 * images.astype(jnp.float32) + 0.5, self.image_px, self.image_px)
    return self.embed_pixels(params, (pixels - jnp.asarray(self.mean)) / jnp.asarray(self.std))

  def embed_pixels(self, params: dict, pixels: jax.Array) -> jax.Array:
    """Unit-norm embeddings float32[B, E] of pixels float[B, height, width, 3] that are resized and normalized."""
    dtype = params["patch_embed"]["kernel"].dtype
    features = nnx.merge(self.graphdef, params)(pixels.astype(dtype)).astype(jnp.float32)
    return features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), NORM_FLOOR)
