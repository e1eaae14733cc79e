"""A group of captions per image with transformers' `generate`, which repeats image and prompt for each caption."""

from benchmarks import inputs
from benchmarks.timing import Case
from benchmarks.torch_peers import captioner
from benchmarks.torch_peers.nets import Nets


def cases(nets: Nets) -> dict:
  size = nets.size
  images = inputs.images(size, size.caption_px, size.prompts)

  def group(rollouts, length):
    # Merged adapters, as TRL generates.
    policy = nets.captioner_policy
    policy.merge_adapter()

    def run(temperature=1.0):
      tokens = captioner.generate(nets, nets.captioner, images, rollouts, length, temperature=temperature)
      nets.wait()
      return tokens

    return Case(
      run=run,
      unit="tokens",
      amount=size.prompts * rollouts * length,
      check=lambda: run(0.0)[:, : min(length, 16)].flatten().tolist(),
    )

  return {f"G={size.rollouts} T={size.caption_tokens}": lambda: group(size.rollouts, size.caption_tokens)}
