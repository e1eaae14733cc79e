"""Images from contexts with diffusers' SD3 transformer and scheduler, with classifier-free guidance."""

from benchmarks import inputs
from benchmarks.timing import Case
from benchmarks.torch_peers import decoder
from benchmarks.torch_peers.nets import Nets


def cases(nets: Nets) -> dict:
  size = nets.size

  def guided():
    rows = size.sampling_batch
    states = nets.tensor(inputs.context(size, rows + 1, nets.decoder.config.joint_attention_dim)).to(nets.dtype)
    noise = nets.noise(inputs.noise(size, size.sampling_px, rows))
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

  return {f"{size.sampling_px} px, {size.sampling_steps} steps, guidance": guided}
