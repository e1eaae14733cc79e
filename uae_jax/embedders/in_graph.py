"""An embedding network inside a jitted step."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from uae_jax.layers.resize import resize

NORM_FLOOR = 1e-12


@dataclasses.dataclass(frozen=True)
class EmbeddingNetwork:
  """One embedding network as a pure function of its parameters, to be called inside jit.

  Attributes:
    kind: one of `registry.KINDS`; names the architecture in logs.
    graphdef: of a module that maps normalized pixels float[B, height, width, 3] to features float[B, E].
    image_px: side of the square that images are stretched to.
    mean: of the channels in 0..1.
    std: of the channels in 0..1.
  """

  kind: str
  graphdef: nnx.GraphDef
  image_px: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]

  def __call__(self, params: dict, images: jax.Array) -> jax.Array:
    """Unit-norm embeddings of images, differentiable in both arguments.

    The whole image is stretched to the network's size with torch's bicubic without antialiasing, as the official
    cold-start loss does; an image that has the size already is not resized. Computes in the dtype of the parameters.

    Args:
      params: nested dict of the network.
      images: float[B, H, W, 3] in [-1, 1].

    Returns:
      float32[B, E].
    """
    pixels = resize(0.5 * images.astype(jnp.float32) + 0.5, self.image_px, self.image_px)
    return self.embed_pixels(params, (pixels - jnp.asarray(self.mean)) / jnp.asarray(self.std))

  def embed_pixels(self, params: dict, pixels: jax.Array) -> jax.Array:
    """Unit-norm embeddings float32[B, E] of pixels float[B, height, width, 3], resized and normalized."""
    dtype = params["patch_embed"]["kernel"].dtype
    features = nnx.merge(self.graphdef, params)(pixels.astype(dtype)).astype(jnp.float32)
    return features / jnp.maximum(jnp.linalg.norm(features, axis=-1, keepdims=True), NORM_FLOOR)
