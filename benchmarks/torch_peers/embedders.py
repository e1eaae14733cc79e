"""The reward and metric embedders of transformers, on images of their input size."""

import torch

from benchmarks import inputs
from benchmarks.timing import Case
from benchmarks.torch_peers.nets import Nets


def cases(nets: Nets) -> dict:
  size = nets.size

  def embed(name):
    model = getattr(nets, name)
    side = inputs.EMBEDDER_PX if size.networks == "full" else model.config.image_size
    pixels = nets.tensor(inputs.pixels(size, side, size.encoder_batch)).permute(0, 3, 1, 2).contiguous().to(nets.dtype)
    forward = nets.compiled(lambda x: model(x).image_embeds if name == "clip" else model(x).last_hidden_state[:, 0])

    @torch.no_grad()
    def run():
      features = torch.nn.functional.normalize(forward(pixels).float(), dim=-1)
      nets.wait()
      return features

    return Case(
      run=run,
      unit="images",
      amount=size.encoder_batch,
      check=lambda: run().flatten()[::17].tolist(),
    )

  return {f"{name}, {size.encoder_batch} images": lambda n=name: embed(n) for name in ("clip", "dinov2")}
