"""VAE: images to latents and back."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import inputs
from benchmarks.costs import matrix_flops
from benchmarks.timing import Case
from benchmarks.world import World


def cases(world: World) -> dict:
  size = world.size
  side, count = size.vae_px, max(1, size.encoder_batch // 8)

  def direction(name, array):
    def apply(params, x):
      model = world.networks.uae(params)
      return model.encode_image(x) if name == "encode" else model.decode_latents(x)

    x, compiled = jnp.asarray(array), jax.jit(apply)

    def run():
      return jax.block_until_ready(compiled(world.params, x))

    return Case(
      run=run,
      unit="images",
      amount=count,
      flops=matrix_flops(apply, world.params, x),
      check=lambda: np.asarray(run()).ravel()[::97].tolist(),
    )

  return {
    f"encode {count} x {side} px": lambda: direction("encode", inputs.pixels(size, side, count)),
    f"decode {count} x {side} px": lambda: direction("decode", inputs.noise(size, side, count)),
  }
