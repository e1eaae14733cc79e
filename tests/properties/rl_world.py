"""A UAE at the smallest valid sizes, with which whole RL steps compile in seconds. Made once per test session."""

import dataclasses
import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from uae_jax import sharding, trees
from uae_jax.data.processing import Processor
from uae_jax.layers.lora import LoRA, is_adapter
from uae_jax.options import DataOptions, Experiment, OptimizerOptions
from uae_jax.small_world import phrases, render, scenes
from uae_jax.small_world.processor import write_processor
from uae_jax.training import sizes
from uae_jax.training.build import Built, build
from uae_jax.training.optimizer import make_optimizer
from uae_jax.training.state import State, create

TOKENS = 26
PROMPTS, ROLLOUTS = 4, 3
OPTIMIZER = make_optimizer(OptimizerOptions(learning_rate=1e-3, schedule="constant"), 10)


CONFIG = Experiment(data=DataOptions(image_px=32, caption_tokens=TOKENS), stages=("vae",))


@functools.cache
def mesh():
  return sharding.make_mesh(data=4, fsdp=2)


@functools.cache
def built() -> Built:
  """The small world's networks with one layer each."""
  with tempfile.TemporaryDirectory() as folder:
    write_processor(folder)
    processor = Processor.from_folder(folder)
  uae = sizes.named_uae("scenes", processor, LoRA(4, 4.0))
  captioner = dataclasses.replace(
    uae.captioner,
    vision=dataclasses.replace(uae.captioner.vision, depth=1, full_attention_layers=(0,)),
    language=dataclasses.replace(uae.captioner.language, depth=1),
  )
  uae = dataclasses.replace(uae, captioner=captioner, decoder=dataclasses.replace(uae.decoder, depth=2))
  embedders = {kind: sizes.fresh_embedder(kind, "scenes") for kind in ("clip", "dinov2")}
  embedders = {
    kind: dataclasses.replace(size, network=dataclasses.replace(size.network, depth=1))
    for kind, size in embedders.items()
  }
  return build(CONFIG, sizes.Sizes(uae, embedders), processor, mesh())


@functools.cache
def params() -> dict:
  """Random parameters without zeros (adapters, modulations and outputs start at zero), so that all have an effect.

  numpy draws them, because a program that draws every leaf would take longer to compile than the steps.
  """
  random = np.random.default_rng(0)

  def draw(path, leaf):
    values = random.normal(size=leaf.shape)
    values = values / np.sqrt(np.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 0.05 * values
    return jnp.asarray(values + ("scal" in path.rsplit("/", 1)[-1]), leaf.dtype)

  nets = built()

  def constants(key):
    leaves = dict(trees.items(nets.init(key)))
    return {path: leaves[path] for path in nets.buffers}

  stored = jax.jit(constants)(jax.random.key(0))
  abstract = trees.items(nets.abstract_params)
  return trees.from_items((path, stored.get(path, draw(path, leaf))) for path, leaf in abstract)


@functools.cache
def batch() -> dict:
  scene = scenes.scenes(np.arange(PROMPTS))
  tokens, _ = built().processor.caption_rows(phrases.captions_text(scene, "full"), TOKENS)
  return {"image": render.render_batch(scene), "tokens": tokens}


def state_of(net: str, tree: dict | None = None, **averages: bool) -> State:
  """Initial state of a stage that trains the adapters of one network, with averages such as `has_old`."""
  tree = params() if tree is None else tree
  key = jax.random.key(3)
  return create(tree, lambda path: path.startswith(net) and is_adapter(path), OPTIMIZER, key, has_ema=False, **averages)
