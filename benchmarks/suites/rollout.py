"""A group of captions per image: one prefill of image and question, then token-by-token decoding."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import inputs
from benchmarks.costs import matrix_flops
from benchmarks.suites.ahead import compile_ahead
from benchmarks.timing import Case
from benchmarks.world import World
from uae_jax import trees
from uae_jax.rollouts import captions

NEEDS = ("captioner",)


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
    arguments = (world.params, images, jax.random.key(0), jnp.float32(1.0))
    compiled, fields = compile_ahead(sample, arguments)

    def run(temperature=1.0):
      return jax.block_until_ready(compiled(*arguments[:3], jnp.float32(temperature))).tokens

    return Case(
      run=run,
      unit="tokens",
      amount=size.prompts * rollouts * length,
      flops=matrix_flops(sample, *arguments),
      bytes=decode_bytes(world, length),
      **fields,
      check=lambda: np.asarray(run(0.0))[:, 0, : min(length, 16)].ravel().tolist(),
    )

  return {f"G={size.rollouts} T={size.caption_tokens}": lambda: group(size.rollouts, size.caption_tokens)}
