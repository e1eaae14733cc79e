"""One update of the captioner's adapters with a plain PyTorch and PEFT loop."""

from benchmarks import inputs
from benchmarks.timing import Case
from benchmarks.torch_peers import captioner
from benchmarks.torch_peers.nets import Nets
from benchmarks.torch_peers.optimizer import Optimizer


def cases(nets: Nets) -> dict:
  size = nets.size

  def update():
    images = inputs.images(size, size.caption_px, size.prompts)
    tokens, advantages = nets.tensor(inputs.captions(size)).long(), nets.tensor(inputs.advantages(size))
    policy = nets.captioner_policy
    optimizer = Optimizer(policy)
    policy.train()
    forward = nets.compiled(lambda: captioner.log_probs(nets, policy, images, tokens))
    first = None

    def run():
      nonlocal first
      loss = captioner.token_loss(forward(), advantages)
      loss.backward()
      result = float(loss.detach()), optimizer.step()
      nets.wait()
      first = first or result

    return Case(run=run, unit="captions", amount=size.prompts * size.rollouts, check=lambda: list(first))

  return {f"G={size.rollouts} T={size.caption_tokens}": update}
