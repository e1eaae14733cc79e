"""One step on captions and images of Janus: its gradient is the sum of those of the two stages on the same rollouts."""

import dataclasses
import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.janus_folder import SIDE, write_janus_folder
from uae_jax import sharding, trees
from uae_jax.data.janus_processing import JanusProcessor
from uae_jax.embedders.kind import published
from uae_jax.layers.lora import LoRA, is_adapter
from uae_jax.options import AdvantageOptions, DataOptions, Experiment, TokenObjective, UpdateOptions
from uae_jax.options.image_tokens import JointTokenOptions
from uae_jax.training.build import build
from uae_jax.training.rl.phases import compose, phase_keys
from uae_jax.training.sizes import Sizes
from uae_jax.training.stages import joint_tokens
from uae_jax.training.state import create
from uae_jax.weights import janus_folder

PROMPTS, CAPTIONS, IMAGES, LENGTH = 4, 3, 2, 6
WEIGHT = 0.5
SGD = optax.sgd(1.0)
OBJECTIVE = TokenObjective(beta=0.1, top_entropy=0.6)


@functools.cache
def world():
  """(built run of a tiny Janus, parameters with adapters that have an effect)."""
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  with tempfile.TemporaryDirectory() as folder:
    write_janus_folder(folder)
    config, _ = janus_folder._open(janus_folder.Path(folder))
    processor = JanusProcessor.from_folder(janus_folder.Path(folder))
  clip = published("clip")
  network = dataclasses.replace(
    clip.network, image_px=SIDE, patch=8, width=16, depth=1, num_heads=2, mlp_width=16, projection_width=8
  )
  clip = dataclasses.replace(clip, network=network, image_px=SIDE)
  run = Experiment(model="weights", data=DataOptions(image_px=SIDE, caption_tokens=LENGTH), stages=("vae",))
  built = build(run, Sizes(config.with_adapters(LoRA(4, 4.0)), {"clip": clip}), processor, mesh)
  random = np.random.default_rng(0)

  def draw(path, leaf):
    values = random.normal(size=leaf.shape) / (np.prod(leaf.shape[:-1]) ** 0.5 if len(leaf.shape) > 1 else 20)
    return jnp.asarray(values + path.endswith("scale"), leaf.dtype)

  abstract = trees.items(built.abstract_params)
  return built, trees.from_items((path, draw(path, leaf)) for path, leaf in abstract)


def phases(**updates):
  options = JointTokenOptions(
    num_rollouts=CAPTIONS, images_per_caption=IMAGES, max_new_tokens=LENGTH, guidance=2.0, image_weight=WEIGHT
  )
  return joint_tokens.make_phases(
    world()[0].networks, options, OBJECTIVE, AdvantageOptions(), UpdateOptions(**updates), SGD
  )


@functools.cache
def rollout():
  """(state, batch, rollout, rewards, advantages) of a step."""
  _, params = world()
  state = create(params, is_adapter, SGD, jax.random.key(0), has_ema=False)
  images = np.random.default_rng(1).integers(0, 256, (PROMPTS, SIDE, SIDE, 3), np.uint8)
  batch, made = {"image": jnp.asarray(images)}, phases()
  rollout_key, reward_key = phase_keys(state)
  tree = jax.jit(made.rollout)(state.params, batch, rollout_key, state.step)
  rewards, metrics = jax.jit(made.reward)(state.params, batch, tree, reward_key)
  return state, batch, tree, rewards, metrics, made.advantages(rewards)


def test_a_tree_of_rollouts():
  _, _, tree, rewards, metrics, ((of_captions, of_images), more) = rollout()
  assert tree.captions.tokens.shape == (PROMPTS, CAPTIONS, LENGTH)
  assert tree.images.tokens.shape[:3] == (PROMPTS, CAPTIONS, IMAGES)
  each = np.asarray(rewards["clip"]).reshape(PROMPTS, CAPTIONS, IMAGES)
  means = each.mean(-1)
  spread = means.std(-1, ddof=1, keepdims=True) + AdvantageOptions().eps
  np.testing.assert_allclose(of_captions, (means - means.mean(-1, keepdims=True)) / spread, rtol=1e-3, atol=1e-4)
  spread = each.std(-1, ddof=1, keepdims=True) + AdvantageOptions().eps
  np.testing.assert_allclose(of_images, (each - each.mean(-1, keepdims=True)) / spread, rtol=1e-3, atol=1e-4)
  assert more["reward"] == pytest.approx(each.mean(), abs=1e-6) and metrics["caption_length"] > 0
  assert more["image_reward_std_in_group"] > 0


def change(made):
  """(what a step of gradient descent adds to the adapters, metrics)."""
  state, batch, tree, _, _, (values, _) = rollout()
  after, metrics = jax.jit(made.update)(state, batch, tree, values)
  return jax.tree.map(jnp.subtract, after.trainable, state.trainable), metrics


def test_the_gradient_is_the_sum_of_both():
  state, batch, tree, _, _, ((of_captions, of_images), _) = rollout()
  made = phases()
  stage = made.update.__self__
  found, metrics = change(made)
  first, words = jax.jit(stage.caption_update)(state, batch["image"], tree.captions, None, of_captions)
  texts, images, of_images = (
    jax.tree.map(joint_tokens._join, x) for x in (tree.captions.tokens, tree.images, of_images)
  )
  second, pictures = jax.jit(stage.image_update)(state, texts, images, None, of_images)
  for (path, ours), before, one, other in zip(
    trees.items(found), *map(jax.tree.leaves, (state.trainable, first.trainable, second.trainable)), strict=True
  ):
    wanted = (one - before) + WEIGHT * (other - before)
    assert np.abs(wanted).max() > 0, path
    np.testing.assert_allclose(ours, wanted, atol=2e-6, rtol=2e-3, err_msg=path)
  assert metrics["loss"] == pytest.approx(float(words["loss"] + WEIGHT * pictures["loss"]), abs=1e-5)
  assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-6) == metrics["image_ratio_mean"]
  assert metrics["image_log_prob_difference_max"] < 1e-4
  for name in ("entropy", "kl", "log_prob_difference"):
    assert metrics[name] == pytest.approx(float(words[name]), abs=1e-5)
    assert metrics[f"image_{name}"] == pytest.approx(float(pictures[name]), abs=1e-5)


def test_microbatches_add_up():
  whole, metrics = change(phases())
  parts, in_parts = change(phases(num_microbatches=2))
  for (path, ours), wanted in zip(trees.items(parts), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(ours, wanted, atol=2e-6, rtol=2e-3, err_msg=path)
  assert in_parts["loss"] == pytest.approx(float(metrics["loss"]), abs=1e-5)


def test_off_policy_steps_start_at_a_ratio_of_one():
  made = phases(num_epochs=2)
  state, batch, *_ = rollout()
  _, metrics = jax.jit(compose(made))(state, batch)
  assert np.isfinite(metrics["loss"]) and metrics["log_prob_difference_max"] < 1e-4
  assert metrics["image_log_prob_difference_max"] < 1e-4
