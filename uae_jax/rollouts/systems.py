"""How the kinds of systems generate images, one row per kind."""

from collections.abc import Callable

import jax

from uae_jax.models.janus.system import JanusSystem
from uae_jax.models.system import System
from uae_jax.models.uae import UAE
from uae_jax.rollouts import image_tokens, images

# Class of the module -> its sampler, with the arguments of `reconstruct.generate`.
GENERATE: dict[type, Callable[..., jax.Array]] = {UAE: images.generate, JanusSystem: image_tokens.generate}


def find(model: System) -> Callable[..., jax.Array]:
  """The sampler of a system's images."""
  return GENERATE[type(model)]
