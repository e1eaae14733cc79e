"""The reward and metric embedders, on images of their input size."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import inputs
from benchmarks.costs import matrix_flops
from benchmarks.suites.ahead import compile_ahead
from benchmarks.timing import Case
from benchmarks.world import World

NEEDS = ("embedders",)


def cases(world: World) -> dict:
  size = world.size

  def embed(name):
    network, params = world.networks.embedders[name], world.params["embedders"][name]
    pixels = jnp.asarray(inputs.pixels(size, network.image_px, size.encoder_batch))
    compiled, fields = compile_ahead(network.embed_pixels, (params, pixels))

    def run():
      return jax.block_until_ready(compiled(params, pixels))

    return Case(
      run=run,
      unit="images",
      amount=size.encoder_batch,
      flops=matrix_flops(network.embed_pixels, params, pixels),
      check=lambda: np.asarray(run()).ravel()[::17].tolist(),
      **fields,
    )

  return {f"{name}, {size.encoder_batch} images": lambda n=name: embed(n) for name in ("clip", "dinov2")}
