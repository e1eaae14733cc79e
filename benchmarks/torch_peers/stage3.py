"""The whole step of stage 3 in PyTorch: one caption per image, stochastic samples, reward, update."""

from benchmarks import inputs
from benchmarks.timing import Case
from benchmarks.torch_peers import captioner, decoder, reward
from benchmarks.torch_peers.nets import Nets
from benchmarks.torch_peers.optimizer import Optimizer


def cases(nets: Nets) -> dict:
  size = nets.size

  def step():
    captioner_images = inputs.images(size, size.caption_px, size.prompts)
    originals = reward.originals(nets, inputs.images(size, size.image_px, size.prompts))
    optimizer = Optimizer(nets.decoder_policy)
    velocity = decoder.make_velocity(nets, nets.decoder_policy)

    def run():
      # The captioner is frozen, but its adapters are off where captions are encoded.
      nets.captioner_policy.merge_adapter()
      tokens = captioner.generate(nets, nets.captioner, captioner_images, 1, size.caption_tokens)
      nets.captioner_policy.unmerge_adapter()
      context = captioner.encode_captions(nets, tokens).repeat_interleave(size.rollouts, dim=0)
      noise = nets.noise(inputs.noise(size, size.image_px, size.prompts)).repeat_interleave(size.rollouts, dim=0)
      kept, final = decoder.sample_group(nets, velocity, context, noise, size.sde_steps, size.window)
      values = reward.advantages(nets, final, originals).flatten()
      decoder.flow_update(nets, velocity, kept, context, values, size.sde_steps, optimizer)
      nets.wait()

    return Case(run=run, unit="images", amount=size.prompts * size.rollouts)

  return {f"G={size.rollouts}, {size.sde_steps} sampler steps, window {size.window}": step}
