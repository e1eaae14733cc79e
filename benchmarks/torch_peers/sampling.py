"""Images from contexts with the SD3 transformer and Euler steps, with classifier-free guidance."""

from benchmarks import inputs
from benchmarks.sizes import case_name
from benchmarks.timing import Case
from benchmarks.torch_peers import decoder
from benchmarks.torch_peers.nets import Nets


def cases(nets: Nets) -> dict:
  size = nets.size

  def guided(side):
    rows = size.sampling_batch
    states = nets.tensor(inputs.context(size, rows + 1, nets.decoder.config.joint_attention_dim)).to(nets.dtype)
    noise = nets.noise(inputs.noise(size, side, rows))
    velocity = decoder.make_velocity(nets, nets.decoder)

    def run():
      latents = decoder.sample(
        nets, velocity, states[:rows], noise, size.sampling_steps, negative=states[rows:], guidance=size.guidance
      )
      nets.wait()
      return latents

    return Case(
      run=run,
      unit="images",
      amount=rows,
      check=lambda: run().movedim(1, -1).flatten()[::97].tolist(),
    )

  return {case_name(size, side): lambda side=side: guided(side) for side in size.sampling_px}
