"""VAE: images to latents and back with SD3's autoencoder."""

import torch

from benchmarks import inputs
from benchmarks.timing import Case
from benchmarks.torch_peers.nets import Nets


def cases(nets: Nets) -> dict:
  size = nets.size
  count = size.vae_batch

  def direction(name, array):
    model, config = nets.vae, nets.vae.config
    x = nets.noise(array).to(nets.dtype)

    def encode(x):
      return (model.encode(x).latent_dist.mode() - config.shift_factor) * config.scaling_factor

    def decode(x):
      return model.decode(x / config.scaling_factor + config.shift_factor, return_dict=False)[0]

    apply = nets.compiled(encode if name == "encode" else decode)

    @torch.no_grad()
    def run():
      result = apply(x)
      nets.wait()
      return result

    return Case(
      run=run,
      unit="images",
      amount=count,
      check=lambda: run().movedim(1, -1).flatten()[::97].float().tolist(),
    )

  arrays = {"encode": inputs.pixels, "decode": inputs.noise}
  return {
    f"{name} {count} x {side} px": lambda n=name, s=side: direction(n, arrays[n](size, s, count))
    for side in size.vae_px
    for name in arrays
  }
