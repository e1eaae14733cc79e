"""A group of captions per image: one prefill of image and question, then token-by-token decoding."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import inputs
from benchmarks.costs import matrix_flops
from benchmarks.timing import Case
from benchmarks.world import World
from uae_jax import trees
from uae_jax.rollouts import captions


def sampler(world: World, rollouts: int, length: int):
  """Makes the function (params, images, key, temperature) -> Captions."""

  def sample(params, images, key, temperature):
    model = world.networks.uae(params)
    prefix = captions.caption_prefix(model, world.networks.prompts, images)
    return captions.sample_captions(
      model.captioner,
      world.networks.prompts,
      prefix,
      key,
      num_rollouts=rollouts,
      max_tokens=length,
      temperature=temperature,
    )

  return sample


def decode_bytes(world: World, length: int) -> float:
  """Minimum bytes that decoding reads: the language model once per token."""
  language = {"language": world.abstract["captioner"]["language"]}
  return length * trees.count(language) * jnp.dtype(world.size.dtype).itemsize


def cases(world: World) -> dict:
  size = world.size
  images = jnp.asarray(inputs.images(size, size.caption_px, size.prompts))

  def group(rollouts, length):
    sample = sampler(world, rollouts, length)
    compiled = jax.jit(sample)
    flops = matrix_flops(sample, world.params, images, jax.random.key(0), 1.0, while_trips=length)

    def run(temperature=1.0):
      return jax.block_until_ready(compiled(world.params, images, jax.random.key(0), temperature)).tokens

    return Case(
      run=run,
      unit="tokens",
      amount=size.prompts * rollouts * length,
      flops=flops,
      bytes=decode_bytes(world, length),
      check=lambda: np.asarray(run(0.0))[:, 0, : min(length, 16)].ravel().tolist(),
    )

  return {f"G={size.rollouts} T={size.caption_tokens}": lambda: group(size.rollouts, size.caption_tokens)}
