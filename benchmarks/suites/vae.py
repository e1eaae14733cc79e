"""VAE: images to latents and back."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import inputs
from benchmarks.costs import matrix_flops
from benchmarks.suites.ahead import compile_ahead
from benchmarks.timing import Case
from benchmarks.world import World

NEEDS = ("vae",)


def cases(world: World) -> dict:
  size = world.size
  count = size.vae_batch

  def direction(name, array):
    def apply(params, x):
      model = world.networks.uae(params)
      return model.encode_image(x) if name == "encode" else model.decode_latents(x)

    x = jnp.asarray(array)
    compiled, fields = compile_ahead(apply, (world.params, x))

    def run():
      return jax.block_until_ready(compiled(world.params, x))

    return Case(
      run=run,
      unit="images",
      amount=count,
      flops=matrix_flops(apply, world.params, x),
      check=lambda: np.asarray(run()).ravel()[::97].tolist(),
      **fields,
    )

  arrays = {"encode": inputs.pixels, "decode": inputs.noise}
  return {
    f"{name} {count} x {side} px": lambda n=name, s=side: direction(n, arrays[n](size, s, count))
    for side in size.vae_px
    for name in arrays
  }
