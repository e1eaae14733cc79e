"""One update of the decoder's adapters with a plain PyTorch and PEFT loop."""

from benchmarks import inputs
from benchmarks.timing import Case
from benchmarks.torch_peers import decoder
from benchmarks.torch_peers.nets import Nets
from benchmarks.torch_peers.optimizer import Optimizer


def cases(nets: Nets) -> dict:
  size = nets.size

  def update():
    states = nets.tensor(inputs.context(size, size.prompts + 1, nets.decoder.config.joint_attention_dim))
    context = states[: size.prompts].to(nets.dtype).repeat_interleave(size.rollouts, dim=0)
    latents = nets.noise(inputs.noise(size, size.image_px, size.prompts, size.window + 1, size.rollouts))
    kept = list(latents.transpose(0, 1).flatten(1, 2).contiguous())
    advantages = nets.tensor(inputs.advantages(size)).flatten()
    optimizer = Optimizer(nets.decoder_policy)
    velocity = decoder.make_velocity(nets, nets.decoder_policy)
    first = None

    def run():
      nonlocal first
      result = decoder.flow_update(nets, velocity, kept, context, advantages, size.sde_steps, optimizer)
      nets.wait()
      first = first or result

    return Case(run=run, unit="images", amount=size.prompts * size.rollouts, check=lambda: list(first))

  return {f"G={size.rollouts} window {size.window}": update}
