"""Every stage takes the same steps on every mesh: losses, parameters and rollouts equal one device up to rounding.

The default run covers pre-training on all three axes at once; `pytest -m slow` covers every stage on every mesh.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from uae_jax import sharding, trees
from uae_jax.commands.config_file import load_config
from uae_jax.data.processing import Processor
from uae_jax.options import REINFORCEMENT, read_config
from uae_jax.small_world import phrases, render, sizes
from uae_jax.small_world import scenes as scenes_data
from uae_jax.small_world.processor import write_processor
from uae_jax.training.build import build
from uae_jax.training.rl.phases import phase_keys
from uae_jax.training.sizes import Sizes, fresh_embedder
from uae_jax.training.stage import make_phases, make_stage, stage_optimizer

CONFIG = Path(__file__).parents[2] / "configs" / "scenes.py"
ROWS, TOKENS, STEPS = 8, 26, 3
# The small world has 2 heads; this one has as many as the largest `tensor` axis.
HEADS = 8
ONE = (1, 1, 1)
STAGES = ("pretrain", "cold_start", *REINFORCEMENT)
MESHES = ((8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8))
DEFAULT = (("pretrain", (2, 2, 2)),)
CASES = [
  pytest.param(
    name, mesh, id=f"{name}-{'x'.join(map(str, mesh))}", marks=() if (name, mesh) in DEFAULT else pytest.mark.slow
  )
  for name in STAGES
  for mesh in MESHES
]


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
  """Lowers compiler effort: each program runs only three times."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def config():
  """The smoke run with large steps, and with few and short captions."""
  config = load_config(f"{CONFIG}:smoke")
  for name in STAGES:
    config[name].batch_size = ROWS
    config[name].total_steps = STEPS
    # Adam divides by the magnitude of a gradient: with the default eps, rounding noise alone would change a weight.
    config[name].optimizer.eps = 1e-3
  config.cold_start.options.sampler_steps = config.cold_start.options.gradient_steps = 1
  for name in REINFORCEMENT:
    config[name].options.max_new_tokens = 6
  config.generation_for_understanding.options.sampler_steps = 2
  stage3 = config.understanding_for_generation.options
  stage3.sampler_steps, stage3.window, stage3.window_range = 3, 1, (0, 2)
  return read_config(config)


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> Processor:
  folder = tmp_path_factory.mktemp("processor")
  write_processor(folder)
  return Processor.from_folder(folder)


def small_sizes(processor: Processor) -> Sizes:
  """The small world with eight heads and the fewest layers that include every kind of layer."""
  vocabulary = -(-processor.vocab_size // HEADS) * HEADS
  uae = sizes.uae(vocabulary, processor.image_token_id, rank=4, alpha=4.0)
  width = sizes.WIDTH // HEADS
  captioner = dataclasses.replace(
    uae.captioner,
    vision=dataclasses.replace(uae.captioner.vision, num_heads=HEADS),
    language=dataclasses.replace(
      uae.captioner.language, depth=1, num_heads=HEADS, num_kv_heads=HEADS, head_width=width, mrope_sections=(2, 1, 1)
    ),
  )
  decoder = dataclasses.replace(uae.decoder, depth=2, num_heads=HEADS, head_width=width)
  embedders = {}
  for kind in ("clip", "dinov2"):
    encoder = fresh_embedder(kind, sizes.SMALL_WORLD)
    network = dataclasses.replace(encoder.network, num_heads=HEADS, depth=1)
    embedders[kind] = dataclasses.replace(encoder, network=network)
  return Sizes(dataclasses.replace(uae, captioner=captioner, decoder=decoder), embedders)


def random_params(built) -> dict:
  """Parameters that all have an effect: no adapter, modulation or output is zero."""
  rng = np.random.default_rng(0)
  leaves = []
  for path, leaf in trees.items(built.abstract_params):
    around = 1.0 if path.endswith("scale") else 0.0
    value = (around + 0.1 * rng.normal(size=leaf.shape)).astype(leaf.dtype)
    leaves.append((path, jax.device_put(value, leaf.sharding)))
  return trees.from_items(leaves)


def batches(built, mesh) -> list[dict]:
  """The same global batches on any mesh."""
  found = []
  for i in range(STEPS):
    scene = scenes_data.scenes(np.arange(ROWS * i, ROWS * (i + 1)))
    tokens, _ = built.processor.caption_rows(phrases.captions_text(scene, "full"), TOKENS)
    batch = {"image": render.render_batch(scene), "tokens": tokens}
    found.append(jax.device_put(batch, sharding.batch_sharding(mesh)))
  return found


@pytest.fixture(scope="module")
def world(processor):
  """Mesh shape -> (mesh, networks, parameters, batches), each made once."""

  def make(shape: tuple[int, int, int]):
    mesh = sharding.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    built = build(config(), small_sizes(processor), processor, mesh)
    return mesh, built, random_params(built), batches(built, mesh)

  return functools.cache(make)


def train(name: str, mesh, built, params: dict, batches: list[dict]) -> tuple[list[dict], dict, list]:
  """Runs three steps of a stage; returns (metrics per step, trained parameters, rollouts per step)."""
  with jax.set_mesh(mesh):
    stage = make_stage(config(), name, built, params, seed=1)
    state, step, metrics, rollouts = stage.state, stage.step, [], []
    if name in REINFORCEMENT:
      step = recorded_step(name, built, rollouts)
    for batch in batches:
      state, measured = step(state, batch)
      metrics.append(
        {key: float(np.asarray(measured[key])) for key in ("loss", "grad_norm", "reward") if key in measured}
      )
    return metrics, dict(trees.items(jax.device_get(state.trainable))), jax.device_get(rollouts)


def recorded_step(name: str, built, rollouts: list):
  """The phases of a stage, each jitted as in training, with recorded trajectories."""
  optimizer, _, _ = stage_optimizer(config().section(name))
  phases = make_phases(config(), name, built, optimizer)
  rollout, reward, update = jax.jit(phases.rollout), jax.jit(phases.reward), jax.jit(phases.update)
  advantages = jax.jit(phases.advantages)
  # One program at a time: on few cores, virtual devices deadlock if the collectives of two programs interleave.
  wait = jax.block_until_ready

  def step(state, batch):
    rollout_key, reward_key = phase_keys(state)
    trajectory = wait(rollout(wait(phases.sampling_params(state)), batch, rollout_key, state.step))
    rewards, measured = wait(reward(wait(state.params), batch, trajectory, reward_key))
    values, more = wait(advantages(rewards))
    rollouts.append(trajectory.captions.tokens if name == REINFORCEMENT[0] else trajectory.final)
    state, updated = wait(update(state, batch, trajectory, values))
    return state, {**measured, **more, **updated}

  return step


@pytest.fixture(scope="module")
def on_one_device(world):
  return functools.cache(lambda name: train(name, *world(ONE)))


@pytest.mark.parametrize("name, mesh", CASES)
def test_three_steps_are_those_of_one_device(name, mesh, world, on_one_device):
  metrics, params, rollouts = train(name, *world(mesh))
  expected_metrics, expected_params, expected_rollouts = on_one_device(name)
  for ours, theirs in zip(metrics, expected_metrics, strict=True):
    for key in theirs:
      np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-4, atol=1e-5, err_msg=key)
  for ours, theirs in zip(rollouts, expected_rollouts, strict=True):
    if name == REINFORCEMENT[0]:
      np.testing.assert_array_equal(ours, theirs)
    else:
      np.testing.assert_allclose(ours, theirs, atol=1e-4)
  for path, leaf in expected_params.items():
    np.testing.assert_allclose(params[path], leaf, atol=1e-4, err_msg=path)
