"""The RL stages as pure steps: phases compose, micro-batches add, only adapters move, rollout and replay agree."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uae_jax import sharding, trees
from uae_jax.algorithms.advantages import AdvantageOptions
from uae_jax.algorithms.flow_grpo import FlowObjective
from uae_jax.algorithms.grpo import TokenObjective
from uae_jax.data import scenes
from uae_jax.data.processing import Processor
from uae_jax.data.vocabulary import write_processor
from uae_jax.layers.lora import LoRA, is_adapter
from uae_jax.models.prompts import generation_rows
from uae_jax.rollouts import captions
from uae_jax.training import reinforcement, sizes
from uae_jax.training.build import build
from uae_jax.training.optimizer import OptimizerOptions, make_optimizer
from uae_jax.training.reinforcement import UpdateOptions
from uae_jax.training.stages import generation_for_understanding as stage2
from uae_jax.training.stages import understanding_for_generation as stage3
from uae_jax.training.state import create

TOKENS = 26
PROMPTS = 4


@dataclasses.dataclass(frozen=True)
class Data:
  image_px: int = 32
  caption_tokens: int = TOKENS


@dataclasses.dataclass(frozen=True)
class Config:
  model: str = "scenes"
  dtype: str = "float32"
  data: Data = Data()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  folder = tmp_path_factory.mktemp("processor")
  write_processor(folder)
  processor = Processor.from_folder(folder)
  encoders = {kind: sizes.fresh_encoder(kind, "scenes") for kind in ("clip", "dinov2")}
  nets = sizes.Sizes(sizes.named_uae("scenes", processor, LoRA(16, 16.0)), encoders)
  return build(Config(), nets, processor, sharding.make_mesh(data=4, fsdp=2))


@pytest.fixture(scope="module")
def params(built):
  """Fresh parameters whose zero leaves (adapters, modulations, outputs) are random, so that everything has an
  effect.
  """
  params = jax.jit(built.init)(jax.random.key(0))
  leaves = []
  for i, (path, leaf) in enumerate(trees.items(params)):
    noise = 0.05 * jax.random.normal(jax.random.key(i), leaf.shape, leaf.dtype)
    leaves.append((path, leaf + noise if path not in built.buffers else leaf))
  return trees.from_items(leaves)


@pytest.fixture(scope="module")
def batch(built):
  scene = scenes.scenes(np.arange(PROMPTS))
  tokens = np.full((PROMPTS, TOKENS), built.networks.prompts.pad, np.int32)
  for row, i in zip(tokens, range(PROMPTS), strict=True):
    ids = [*built.processor.encode(scenes.full_caption(scene[i])), built.networks.prompts.end[0]]
    row[: len(ids)] = ids
  return {"image": scenes.render_batch(scene), "tokens": tokens}


OPTIMIZER = make_optimizer(OptimizerOptions(1e-3, schedule="constant"), 10)


def captioner_phases(built, optimizer=OPTIMIZER, **changes):
  update = UpdateOptions(**{name: changes.pop(name) for name in list(changes) if name.startswith("num_")})
  options = stage2.GenerationForUnderstandingOptions(
    num_rollouts=3, max_new_tokens=TOKENS, sampler_steps=2, held_out_encoder="dinov2", **changes
  )
  return stage2.make_phases(built.networks, options, TokenObjective(beta=0.1), AdvantageOptions(), update, optimizer)


def decoder_phases(built, optimizer=OPTIMIZER, **changes):
  update = UpdateOptions(**{name: changes.pop(name) for name in list(changes) if name.startswith("num_")})
  objective = FlowObjective(beta=changes.pop("beta", 0.1))
  fields = dict(num_rollouts=3, max_new_tokens=TOKENS, sampler_steps=5, window_range=(0, 2), window=2) | changes
  options = stage3.UnderstandingForGenerationOptions(**fields)
  return stage3.make_phases(built.networks, options, objective, AdvantageOptions(), update, optimizer)


STAGES = {"captioner": captioner_phases, "decoder": decoder_phases}


def state_of(params, net):
  return create(
    params, lambda path: path.startswith(net) and is_adapter(path), OPTIMIZER, jax.random.key(3), has_ema=False
  )


@pytest.mark.parametrize("net", STAGES)
def test_whole_step_equals_phases_and_moves_only_adapters(net, built, params, batch):
  phases, state = STAGES[net](built), state_of(params, net)
  whole, metrics = jax.jit(reinforcement.compose(phases))(state, batch)
  rollout_key, reward_key = reinforcement.phase_keys(state)
  trajectory = jax.jit(phases.rollout)(state.params, batch, rollout_key, state.step)
  rewards, _ = jax.jit(phases.reward)(state.params, batch, trajectory, reward_key)
  values, _ = phases.advantages(rewards)
  apart, apart_metrics = jax.jit(phases.update)(state, batch, trajectory, values)
  for (path, ours), (_, theirs) in zip(trees.items(whole.trainable), trees.items(apart.trainable), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=2e-5, err_msg=path)
  assert jax.tree.all(jax.tree.map(np.array_equal, whole.frozen, state.frozen))
  assert any(
    not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (whole.trainable, state.trainable)), strict=True)
  )
  for found in (metrics, apart_metrics):
    assert found["ratio_mean"] == 1.0
    assert found["clip_fraction"] == 0.0
    assert found["log_prob_difference"] < 1e-4


@pytest.mark.parametrize("net", STAGES)
def test_the_first_of_several_updates_has_ratio_one(net, built, params, batch):
  """Off policy the old log-probabilities come from a program of their own; bit for bit the same as in the update.

  Without a learning rate every update is a first one.
  """
  still = make_optimizer(OptimizerOptions(0.0, schedule="constant"), 10)
  phases, state = STAGES[net](built, still, num_epochs=2, num_minibatches=2), state_of(params, net)
  rollout_key, reward_key = reinforcement.phase_keys(state)
  trajectory = jax.jit(phases.rollout)(state.params, batch, rollout_key, state.step)
  rewards, _ = jax.jit(phases.reward)(state.params, batch, trajectory, reward_key)
  _, metrics = jax.jit(phases.update)(state, batch, trajectory, phases.advantages(rewards)[0])
  assert metrics["ratio_mean"] == 1.0
  assert metrics["clip_fraction"] == 0.0


@pytest.mark.parametrize("net", STAGES)
def test_microbatches_add_to_the_batch(net, built, params, batch):
  results = []
  for pieces in (1, 2):
    phases, state = STAGES[net](built, num_microbatches=pieces), state_of(params, net)
    results.append(jax.jit(reinforcement.compose(phases))(state, batch)[1])
  for name in ("loss", "grad_norm", "reward"):
    np.testing.assert_allclose(results[0][name], results[1][name], rtol=1e-4, atol=1e-6)


def test_replay_of_sampled_captions_gives_their_log_probs(built, params, batch):
  model = built.networks.uae(params)
  language, prompts = model.captioner.language, built.networks.prompts
  prefix = captions.caption_prefix(model, prompts, batch["image"])
  sampled = captions.sample_captions(
    language, prompts, prefix, jax.random.key(0), num_rollouts=3, max_tokens=TOKENS, temperature=1.3
  )
  log_probs, entropy = captions.caption_log_probs(model, prompts, batch["image"], sampled.tokens, temperature=1.3)
  np.testing.assert_allclose(log_probs * sampled.mask, sampled.log_probs, atol=1e-5)
  assert np.all(entropy >= 0)
  chunked, _ = captions.caption_log_probs(model, prompts, batch["image"], sampled.tokens, temperature=1.3, num_chunks=2)
  np.testing.assert_allclose(chunked, log_probs, atol=1e-6)


def test_templating_on_the_device_equals_the_processor(built, batch):
  prompts, processor = built.networks.prompts, built.processor
  mask = captions.caption_mask(jnp.asarray(batch["tokens"]), prompts)
  rows, row_mask = generation_rows(prompts, jnp.asarray(batch["tokens"]), mask)
  for row, length, tokens in zip(np.asarray(rows), np.asarray(row_mask.sum(axis=1)), batch["tokens"], strict=True):
    text = processor.decode(tokens)
    assert list(row[:length]) == list(processor.generation_prompt(text))


def test_shared_noise_prefix_equals_the_prefix_of_each(built, params, batch):
  """The ODE prefix run once a group gives the trajectories that running it for every rollout gives."""
  from uae_jax.rollouts.contexts import encode_captions
  from uae_jax.rollouts.images import sample_sde, velocity_field

  model = built.networks.uae(params)
  context = encode_captions(built.networks.prompts, model, jnp.asarray(batch["tokens"]))
  noise = jax.random.normal(jax.random.key(5), (PROMPTS, 4, 4, 16))
  run = functools.partial(
    sample_sde,
    lambda repeat: velocity_field(model, context.repeat(repeat)),
    key=jax.random.key(6),
    window_start=jnp.int32(2),
    num_rollouts=3,
    num_steps=6,
    shift=3.0,
    window=2,
    kind="flow",
    noise_level=0.7,
  )
  shared = run(noise=noise, is_noise_shared=True)
  separate = run(noise=jnp.repeat(noise, 3, axis=0), is_noise_shared=False)
  np.testing.assert_allclose(shared.final, separate.final, atol=1e-5)
  np.testing.assert_allclose(shared.log_probs, separate.log_probs, atol=1e-5)


def test_adapters_off_is_the_base(built, params, batch):
  without = nnx.to_pure_dict(nnx.state(built.networks.uae(params)))
  zeroed = trees.from_items(
    (path, jnp.zeros_like(leaf) if path.endswith("lora_b") else leaf) for path, leaf in trees.items(without)
  )
  tokens = jnp.asarray(batch["tokens"])
  mask = jnp.ones(tokens.shape, bool)
  reference = built.networks.uae(params, adapters=False).encode_text(tokens, mask)
  np.testing.assert_array_equal(reference, built.networks.uae(zeroed).encode_text(tokens, mask))
  assert not np.allclose(reference, built.networks.uae(params).encode_text(tokens, mask))
