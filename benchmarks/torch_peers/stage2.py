"""The whole step of stage 2 in PyTorch: captions, re-encoding, reconstructions, reward, update."""

import torch

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
    policy = nets.captioner_policy
    optimizer = Optimizer(policy)
    # The decoder is frozen, so its adapters are merged once.
    nets.decoder_policy.merge_adapter()
    velocity = decoder.make_velocity(nets, nets.decoder)
    log_probs = nets.compiled(lambda tokens: captioner.log_probs(nets, policy, captioner_images, tokens))

    def run():
      policy.eval()
      policy.merge_adapter()
      tokens = captioner.generate(nets, nets.captioner, captioner_images, size.rollouts, size.caption_tokens)
      policy.unmerge_adapter()
      noise = nets.noise(inputs.noise(size, size.image_px, size.prompts)).repeat_interleave(size.rollouts, dim=0)
      chunks = zip(
        captioner.encode_captions(nets, tokens).chunk(size.decode_chunks), noise.chunk(size.decode_chunks), strict=True
      )
      latents = torch.cat([decoder.sample(nets, velocity, *chunk, size.reward_steps) for chunk in chunks])
      values = reward.advantages(nets, latents, originals)
      policy.train()
      captioner.token_loss(log_probs(tokens.unflatten(0, (size.prompts, -1))), values).backward()
      optimizer.step()
      nets.wait()

    return Case(run=run, unit="captions", amount=size.prompts * size.rollouts)

  return {f"G={size.rollouts} T={size.caption_tokens}, {size.reward_steps} sampler steps": step}
