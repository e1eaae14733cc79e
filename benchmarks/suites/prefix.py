"""One prefix per group vs. one per caption, in rollout and update, over the group size; and early end of a group.

"repeated" runs the same functions with every image repeated for each of its captions.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import inputs
from benchmarks.costs import matrix_flops
from benchmarks.suites.ahead import compile_ahead
from benchmarks.suites.rollout import sampler
from benchmarks.timing import Case
from benchmarks.world import World
from uae_jax import trees
from uae_jax.layers.lora import is_adapter
from uae_jax.rollouts import captions

GROUPS = (1, 8, 32)


def cases(world: World) -> dict:
  size = world.size
  length = size.caption_tokens // 2
  image = jnp.asarray(inputs.images(size, size.caption_px, 1))

  def place(group, is_shared):
    """(images, rollouts per image) of a case."""
    return (image, group) if is_shared else (jnp.repeat(image, group, axis=0), 1)

  def case(name, function, arguments, group, is_shared):
    compiled, fields = compile_ahead(function, arguments)
    series = "one prefix" if is_shared else "repeated"
    return Case(
      run=lambda: jax.block_until_ready(compiled(*arguments)),
      unit="captions",
      amount=group,
      flops=matrix_flops(function, *arguments),
      seconds_compile=fields["seconds_compile"],
      facts=fields["facts"] | {"axis": f"group size, {name}", "x": group, "series": series},
    )

  def rollout(group, is_shared):
    images, rollouts = place(group, is_shared)
    arguments = (world.params, images, jax.random.key(0), jnp.float32(1.0))
    return case("rollout", sampler(world, rollouts, length), arguments, group, is_shared)

  def update(group, is_shared):
    images, rollouts = place(group, is_shared)
    tokens = jnp.asarray(inputs.words(size, len(images), rollouts, length, seed=10))
    trainable, frozen = trees.split(world.params, lambda path: path.startswith("captioner") and is_adapter(path))

    def gradient(trainable, frozen, images, tokens):
      def loss(trainable):
        model = world.networks.uae(trees.merge(trainable, frozen))
        log_probs, _ = captions.caption_log_probs(model, world.networks.prompts, images, tokens)
        return jnp.mean(log_probs)

      return jax.grad(loss)(trainable)

    return case("update", gradient, (trainable, frozen, images, tokens), group, is_shared)

  def early(closes_early):
    """Greedy captions of a group: all are equal, so that one of their tokens can serve as the end token."""
    sample = jax.jit(sampler(world, size.rollouts, size.caption_tokens))
    arguments = (world.params, image, jax.random.key(0), jnp.float32(0.0))
    tokens = np.asarray(sample(*arguments).tokens)[0, 0]
    first = max(i for i, token in enumerate(tokens[: len(tokens) // 4 + 1]) if token not in tokens[:i])
    if closes_early:
      ended = dataclasses.replace(world.networks.prompts, end=(int(tokens[first]),))
      networks = dataclasses.replace(world.networks, prompts=ended)
      sample = jax.jit(sampler(dataclasses.replace(world, networks=networks), size.rollouts, size.caption_tokens))
    written = first + 1 if closes_early else size.caption_tokens
    return Case(
      run=lambda: jax.block_until_ready(sample(*arguments)),
      unit="captions",
      amount=size.rollouts,
      facts={"tokens_before_end": written},
    )

  found = {
    f"{name} {'one prefix' if is_shared else 'repeated'} G={group}": lambda f=function, g=group, s=is_shared: f(g, s)
    for name, function in (("rollout", rollout), ("update", update))
    for group in GROUPS
    for is_shared in (True, False)
  }
  return found | {"no caption closes": lambda: early(False), "all captions close early": lambda: early(True)}
